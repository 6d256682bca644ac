"""Data of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.schema import Config


class EmbeddedTaskConfig(Config):
    """Size of the generated corpus (`data.path = "embedded"`)."""

    trees: int = Field(2400, ge=32)
    """Conversation trees to generate."""


class ColumnsConfig(Config):
    """Where a set has column names of its own: the column of each meaning, a path into one such as `answers.text.0`, or a template
    such as `{context} {question}`."""

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
    responses: str | tuple[str, ...] | None = None
    """Ranked replies, best first: one column that holds a list, or one column each."""
    scores: str | tuple[str, ...] | None = None
    """Numbers that rank the replies instead of their order, higher is better."""
    best: str | None = None
    """Position of the best reply, from 0, where the others are not ranked; one of them is taken as the worse."""
    augmented: str | tuple[str, ...] | None = None
    """Generated replies, each worse than the ranked ones; in training one of them is appended as the worst."""
    messages: str | None = None
    """Messages of a whole conversation."""

    def named(self) -> dict[str, str | tuple[str, ...]]:
        """Meaning -> column, of those that are set."""
        return {meaning: column for meaning, column in self.model_dump().items() if column is not None}


class DataConfig(Config):
    """Conversations: where they are and how they are read."""

    path: str = "embedded"
    """File, folder, glob, URL or hub name; `embedded` generates the built-in task."""
    format: Literal["auto", "oasst", "hh", "ranking", "preference", "messages", "instruction", "prompts"] = "auto"
    """Row format; `auto` looks at the first row, or at data.columns."""
    columns: ColumnsConfig = ColumnsConfig()
    strict: bool = False
    """Stop at the first malformed row; otherwise bad rows are counted and written to `quarantine.jsonl` with line and reason."""
    lang: tuple[str, ...] = ("en",)
    """Languages of the root prompt to keep; empty keeps all."""
    top_k: int | None = Field(None, ge=1)
    """SFT: keep only threads whose assistant messages all rank below this (1 = best replies only)."""
    phrases: tuple[str, ...] = ()
    """Leave out SFT samples with an answer that holds one of these phrases, in any case; `refusals` stands for a list of refusals."""
    fill_min_length: int = Field(0, ge=0)
    """SFT: join conversations, in an order drawn by run.seed, until a sample has so many characters; 0 leaves them as they are."""
    max_characters: int = Field(1_000_000, ge=1)
    """Rows with a longer message are set aside."""
    val_split: float = Field(0.2, gt=0, lt=1)
    """Share of conversation trees held out; split by tree, so no conversation is on both sides."""
    template: Literal["auto", "oasst", "chat"] = "auto"
    """`chat` is the tokenizer's own template, `oasst` Open-Assistant's role tokens; `auto` takes `chat` where the tokenizer has one."""
    max_length: int = Field(512, ge=8)
    """Tokens per SFT or RM sequence; longer ones are cut (SFT keeps the head, RM cuts the oldest prompt tokens)."""
    max_prompt_length: int = Field(256, ge=4)
    """Tokens per PPO prompt; longer ones lose their oldest tokens."""
    embedded: EmbeddedTaskConfig = EmbeddedTaskConfig()
