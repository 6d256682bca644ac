"""Data of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.schema import Config


class EmbeddedTaskConfig(Config):
    """Size of the generated corpus (`data.path = "embedded"`)."""

    trees: int = Field(2400, ge=32)
    """Conversation trees to generate."""


class ColumnsConfig(Config):
    """Where a set has column names of its own: the column of each meaning."""

    prompt: str | None = None
    """Text of a prompt, or its messages."""
    response: str | None = None
    """Text of the answer."""
    input: str | None = None
    """Text that belongs behind an instruction."""
    system: str | None = None
    """System message of a row."""
    chosen: str | None = None
    """The preferred answer."""
    rejected: str | None = None
    """The other answer."""
    prefixes: str | None = None
    """Turns of the conversation that ranked replies answer."""
    responses: str | None = None
    """Ranked replies, best first."""
    messages: str | None = None
    """Messages of a whole conversation."""
    text: str | None = None
    """A passage of raw text."""
    context: str | None = None
    """What an answer builds on, for data.system_tags."""

    def named(self) -> dict[str, str]:
        """Meaning -> column, of those that are set."""
        return {meaning: column for meaning, column in self.model_dump().items() if column is not None}


class DataConfig(Config):
    """Conversations: where they are and how they are read."""

    path: str = "embedded"
    """File, folder, glob, URL or hub name; `embedded` generates the built-in task."""
    format: Literal["auto", "oasst", "hh", "ranking", "preference", "messages", "instruction", "prompts", "text"] = "auto"
    """Row format; `auto` looks at the first row, or at data.columns."""
    columns: ColumnsConfig = ColumnsConfig()
    strict: bool = False
    """Stop at the first malformed row; otherwise bad rows are counted and written to `quarantine.jsonl` with line and reason."""
    lang: tuple[str, ...] = ("en",)
    """Languages of the root prompt to keep; empty keeps all."""
    top_k: int | None = Field(None, ge=1)
    """SFT: keep only threads whose assistant messages all rank below this (1 = best replies only)."""
    val_split: float = Field(0.2, gt=0, lt=1)
    """Share of conversation trees held out; split by tree, so no conversation is on both sides."""
    template: Literal["auto", "oasst", "chat"] = "auto"
    """`chat` is the tokenizer's own template, `oasst` Open-Assistant's role tokens; `auto` takes `chat` where the tokenizer has one."""
    max_length: int = Field(512, ge=8)
    """Tokens per SFT or RM sequence; longer ones are cut (SFT by data.overlong, RM cuts the oldest prompt tokens)."""
    max_prompt_length: int = Field(256, ge=4)
    """Tokens per PPO prompt; longer ones lose their oldest tokens."""
    train_on: Literal["assistant", "all"] = "assistant"
    """SFT: learn the assistant turns with their end tokens, or every token but the first."""
    overlong: Literal["head", "window"] = "head"
    """SFT: of a thread longer than data.max_length keep its first tokens, or a stretch of it drawn once by run.seed."""
    window_probability: float = Field(0.8, ge=0, le=1)
    """With data.overlong = "window": share of over-long threads that are cut to a drawn stretch; the others keep their head."""
    system_tags: tuple[Literal["lang", "quality", "humor", "creativity", "length", "context"], ...] = ()
    """Properties told in a system message before each answer that SFT and the reward model learn from, where the data has them
    (`length` it always has); they need the oasst template. Drawn once by run.seed. PPO prompts have none."""
    system_tag_dropout: float = Field(0.5, ge=0, le=1)
    """Chance of each property of each answer to be left out of its system tag."""
    system_prefix: str | None = None
    """System message before every sequence and prompt, within their limits of tokens and never learnt; it needs the oasst template."""
    pad_to_multiple: int = Field(8, ge=1)
    """SFT and RM batches are padded to a multiple of so many tokens."""
    embedded: EmbeddedTaskConfig = EmbeddedTaskConfig()

    @model_validator(mode="after")
    def _system_needs_roles(self) -> DataConfig:
        if self.template == "chat" and (self.system_tags or self.system_prefix):
            raise ValueError(
                'system_tags and system_prefix are written in Open-Assistant\'s roles: set template = "oasst", '
                "or give the rows a system message of their own"
            )
        return self
