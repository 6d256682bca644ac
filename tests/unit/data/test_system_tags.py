"""System tags: what they say, where they stand, and that they are drawn by seed, record and turn alone."""

from __future__ import annotations

import pytest

from app.config.data import DataConfig
from app.data.encoding import Cuts, check_system_options, encode_groups, encode_prompts, encode_threads
from app.data.system_tags import SystemTags
from app.data.templates import Template, build_template, prepare_tokenizer
from app.errors import ConfigError
from app.formats.records import Labels, Message, PromptItem, RankedGroup, Thread
from tests.tiny_models import make_chatml_tokenizer, make_tokenizer

ALL = ("lang", "quality", "humor", "creativity", "length", "context")
LABELS = Labels(lang="en", quality=0.66, humor=0.0, creativity=1.0, context="A fact.\nAnother.")
QUESTION, ANSWER = Message("user", "Why?"), Message("assistant", "It is so, isn't it?", LABELS)


def tag(answer: Message = ANSWER, properties: tuple[str, ...] = ALL, dropout: float = 0.0, record: str = "r", turn: int = 1) -> str:
    found = SystemTags(properties, dropout, seed=1).before(record, turn, answer)
    assert all(message.role == "system" for message in found)
    return "".join(message.content for message in found)


@pytest.fixture(scope="module")
def template() -> Template:
    tokenizer = make_tokenizer()
    prepare_tokenizer(tokenizer, oasst=True)
    return build_template("oasst", tokenizer)


def decoded(template: Template, ids: list[int]) -> str:
    return str(template.tokenizer.decode(ids))


def test_every_property_has_its_line() -> None:
    lines = tag().split("\n")
    assert sorted(lines[:5]) == ["creativity: 1.0", "humor: 0.0", "lang: en", "length: 2", "quality: 0.7"]  # six words: 6 // 5 + 1
    assert lines[5:] == ["context: A fact.", "Another.", ""]


def test_the_order_is_drawn_and_context_is_last() -> None:
    tags = {tag(record=str(k)) for k in range(400)}
    assert len(tags) > 90  # of 120 orders
    assert all(text.endswith("\ncontext: A fact.\nAnother.\n") for text in tags)


@pytest.mark.parametrize(
    ("text", "length"), [("...", 1), ("one two three four", 1), ("one two three four five", 2), ("été ÀB 3,5", 1), ("w " * 99, 20)]
)
def test_length_counts_words_by_five(text: str, length: int) -> None:
    assert tag(Message("assistant", text), ("length",)) == f"length: {length}\n"


def test_only_what_is_known_and_asked_for_is_told() -> None:
    assert tag(properties=("quality",)) == "quality: 0.7\n"
    assert tag(Message("assistant", "Yes."), ("lang", "quality", "context")) == ""
    assert tag(Message("assistant", "Yes.", Labels(context=" \n")), ("context",)) == ""
    assert tag(properties=()) == tag(dropout=1.0) == ""


def test_each_property_is_left_out_by_itself() -> None:
    kept = [{line.split(":")[0] for line in tag(dropout=0.25, record=str(k), properties=ALL[:5]).split("\n") if line} for k in range(2000)]
    for name in ALL[:5]:
        assert sum(name in names for names in kept) / 2000 == pytest.approx(0.75, abs=0.04)
    both = sum({"lang", "length"} <= names for names in kept) / 2000
    assert both == pytest.approx(0.75**2, abs=0.04)


def test_draws_depend_on_seed_record_and_turn_alone() -> None:
    def draws(seed: int, record: str, turn: int) -> list[tuple[Message, ...]]:
        tags = SystemTags(ALL, 0.5, seed)
        return [tags.before(record + str(k), turn, ANSWER) for k in range(20)]

    assert draws(1, "a", 1) == draws(1, "a", 1)
    assert len({tuple(draws(*arguments)) for arguments in ((1, "a", 1), (2, "a", 1), (1, "b", 1), (1, "a", 3))}) == 4


def test_sft_tells_before_each_answer_and_does_not_learn_it(template: Template) -> None:
    config = DataConfig(system_tags=("quality",), system_tag_dropout=0.0)
    second = Message("assistant", "No.", Labels(quality=0.25))
    thread = Thread("t", "t", (Message("system", "Be kind."), QUESTION, ANSWER, QUESTION, second))
    (row,) = encode_threads([thread], template, config, 1, Cuts())
    assert decoded(template, row.ids.tolist()) == (
        "<|system|>Be kind.<|endoftext|><|prompter|>Why?<|endoftext|>"
        "<|system|>quality: 0.7\n<|endoftext|><|assistant|>It is so, isn't it?<|endoftext|>"
        "<|prompter|>Why?<|endoftext|><|system|>quality: 0.2\n<|endoftext|><|assistant|>No.<|endoftext|>"
    )
    assert decoded(template, row.ids[row.loss_mask].tolist()) == "It is so, isn't it?<|endoftext|>No.<|endoftext|>"


def test_a_reward_model_is_told_before_each_answer_and_reply(template: Template) -> None:
    config = DataConfig(system_tags=("quality",), system_tag_dropout=0.0)
    group = RankedGroup("g", "g", (QUESTION, ANSWER, QUESTION), ("Yes.", "No.", "So."), reply_labels=(Labels(quality=0.9), None))
    (row,) = encode_groups([group], template, config, 1, Cuts())
    shared = (
        "<|prompter|>Why?<|endoftext|><|system|>quality: 0.7\n<|endoftext|><|assistant|>It is so, isn't it?<|endoftext|>"
        "<|prompter|>Why?<|endoftext|>"
    )
    assert [decoded(template, ids.tolist()) for ids in row.sequences] == [
        f"{shared}<|system|>quality: 0.9\n<|endoftext|><|assistant|>Yes.<|endoftext|>",
        f"{shared}<|assistant|>No.<|endoftext|>",
        f"{shared}<|assistant|>So.<|endoftext|>",
    ]


def test_each_reply_has_a_draw_of_its_own(template: Template) -> None:
    group = RankedGroup("g", "g", (QUESTION,), tuple(f"No. {k}" for k in range(10, 50)))
    (row,) = encode_groups([group], template, DataConfig(system_tags=("length",), system_tag_dropout=0.5), 1, Cuts())
    told = ["length: 1" in decoded(template, ids.tolist()) for ids in row.sequences]
    assert 10 < sum(told) < 30


def test_prompts_of_ppo_have_none(template: Template) -> None:
    item = PromptItem("p", "p", (QUESTION, ANSWER, QUESTION))
    (prompt,) = encode_prompts([item], template, DataConfig(system_tags=ALL, system_tag_dropout=0.0), Cuts())
    assert "<|system|>" not in decoded(template, prompt.ids.tolist())


@pytest.mark.parametrize("options", [{"system_tags": ("lang",)}, {"system_prefix": "You are kind."}])
def test_a_chat_template_cannot_write_them(options: dict[str, object], template: Template) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(options))}: .*set data\.template = 'oasst'"):
        check_system_options(build_template("auto", make_chatml_tokenizer()), DataConfig.model_validate(options))
    check_system_options(template, DataConfig.model_validate(options))
    with pytest.raises(ValueError, match='set template = "oasst"'):
        DataConfig.model_validate(options | {"template": "chat"})
