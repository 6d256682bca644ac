"""Data of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.schema import Config, InputPath

SHARED = ("lang", "top_k", "phrases", "fill_min_length", "max_characters", "val_split", "max_val_set")
"""Options of the `data` section that a data set may have of its own."""
SINGLE = "data"
"""Name of the data set that `data.path` names."""


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
    text: str | None = None
    """A passage of raw text."""
    context: str | None = None
    """What an answer builds on, for data.system_tags."""

    def named(self) -> dict[str, str | tuple[str, ...]]:
        """Meaning -> column, of those that are set."""
        return {meaning: column for meaning, column in self.model_dump().items() if column is not None}


FormatName = Literal["auto", "oasst", "hh", "ranking", "preference", "messages", "instruction", "prompts", "text"]


class SetConfig(Config):
    """One data set of a mixture. What is not set here is as in the `data` section."""

    path: InputPath | None = None
    """File, folder, glob, URL or hub name; without one, the set's name is looked up in the table of public sets."""
    format: FormatName = "auto"
    columns: ColumnsConfig = ColumnsConfig()
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    split: str | None = None
    """Split of a hub data set, or several joined by +; all of them without one."""
    files: tuple[str, ...] = ()
    """Files of a hub data set, where not all belong to it."""
    stages: tuple[Literal["sft", "rm", "ppo"], ...] = ("sft", "rm", "ppo")
    """Stages that the set is for: SFT takes its conversations, the reward model its rankings, PPO its prompts."""
    fraction: float | None = Field(None, gt=0, le=1)
    """Share of the set's training rows that an epoch takes, drawn anew for each epoch."""
    size: int | None = Field(None, ge=1)
    """Training rows of the set that an epoch takes (all of them where it has fewer), drawn anew for each epoch."""
    lang: tuple[str, ...] | None = None
    top_k: int | None = Field(None, ge=1)
    phrases: tuple[str, ...] | None = None
    fill_min_length: int | None = Field(None, ge=0)
    max_characters: int | None = Field(None, ge=1)
    val_split: float | None = Field(None, gt=0, lt=1)
    max_val_set: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _fraction_or_size(self) -> SetConfig:
        if self.fraction is not None and self.size is not None:
            raise ValueError("fraction and size exclude each other: keep one of them")
        return self

    def rows_per_epoch(self, rows: int) -> int:
        """How many of `rows` training rows an epoch takes: at least one of a set that has any."""
        if self.size is not None:
            return min(self.size, rows)
        return rows if self.fraction is None else min(rows, max(1, round(self.fraction * rows)))


class DataConfig(Config):
    """Conversations: where they are and how they are read."""

    path: InputPath = "embedded"
    """File, folder, glob, URL or hub name; `embedded` generates the built-in task."""
    format: FormatName = "auto"
    """Row format; `auto` looks at the first row, or at data.columns."""
    columns: ColumnsConfig = ColumnsConfig()
    sets: dict[str, SetConfig] = Field(default_factory=dict)
    """Several data sets instead of data.path: name -> table of path, format, columns; subset, split and files (of a hub set); stages;
    fraction or size (what an epoch takes); and lang, top_k, phrases, fill_min_length, max_characters, val_split, max_val_set of its own."""
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
    max_val_set: int | None = Field(None, ge=1)
    """Held-out threads, groups and prompts of a set to keep, drawn at random; the others are left out."""
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
    def _one_source(self) -> DataConfig:
        alone = [f"data.{name}" for name in ("path", "format", "columns") if getattr(self, name) != type(self).model_fields[name].default]
        if self.sets and alone:
            raise ValueError(f"data.sets and {', '.join(alone)} exclude each other: give each set its own, or remove data.sets")
        return self

    def sources(self) -> dict[str, SetConfig]:
        """Every data set by its name, with all that the section says for it; one that `data.path` names is called `data`."""
        given = self.sets or {SINGLE: SetConfig(path=self.path, format=self.format, columns=self.columns)}
        shared = {name: getattr(self, name) for name in SHARED}
        return {
            name: source.model_copy(update={key: value for key, value in shared.items() if getattr(source, key) is None})
            for name, source in given.items()
        }

    @model_validator(mode="after")
    def _system_needs_roles(self) -> DataConfig:
        if self.template == "chat" and (self.system_tags or self.system_prefix):
            raise ValueError(
                'system_tags and system_prefix are written in Open-Assistant\'s roles: set template = "oasst", '
                "or give the rows a system message of their own"
            )
        return self
