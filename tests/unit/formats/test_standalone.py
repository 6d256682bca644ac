"""Formats whose rows stand alone: what each row gives, what is refused and why, and how rows meet in one tree."""

from __future__ import annotations

from typing import Any

import pytest

from app.formats import FORMATS, detect_format, format_of_columns
from app.formats.records import BadRow, Filters, Labels, Row, TreeRecords

HH = "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant: "
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def read(name: str, *values: Any, columns: dict[str, str] | None = None) -> tuple[list[TreeRecords], list[BadRow]]:
    rows = [Row("f", line, repr(value), value) for line, value in enumerate(values, 1)]
    found = list(FORMATS[name].read(rows, Filters(columns=columns or {})))
    return [item for item in found if isinstance(item, TreeRecords)], [item for item in found if isinstance(item, BadRow)]


def one(name: str, value: Any, **columns: str) -> TreeRecords:
    trees, bad = read(name, value, columns=columns)
    assert not bad, bad
    return trees[0]


def turns(messages: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"chosen": HH + "Yes.", "rejected": HH + "No."}, "hh"),
        ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, "preference"),
        ({"chosen": CHAT, "rejected": CHAT}, "preference"),
        ({"prefixes": ["Why?"], "responses": ["a", "b"]}, "ranking"),
        ({"messages": CHAT}, "messages"),
        ({"conversations": [{"from": "human", "value": "Why?"}]}, "messages"),
        ({"INSTRUCTION": "Why?", "RESPONSE": "Because.", "SOURCE": "x"}, "instruction"),
        ({"instruction": "Why?", "input": "", "output": "Because."}, "instruction"),
        ({"prompt": "Why?"}, "prompts"),
        ({"prompt": CHAT[:1], "extra": 3}, "prompts"),
        ({"text": "Once upon a time."}, "text"),
        ({"TEXT": "Once.", "SOURCE": "x", "METADATA": {}}, "text"),
        ({"text": "Once.", "prompt": "Why?"}, "prompts"),
        ({"text": "Once.", "response": "Because."}, None),
        ({"message_id": "a", "text": "Why?"}, "oasst"),
        ({"frage": "Warum?"}, None),
    ],
)
def test_detection(value: Any, name: str | None) -> None:
    assert detect_format(value) == name


def test_hh() -> None:
    tree = one("hh", {"chosen": HH + "Yes.", "rejected": HH + "No."})
    (group,) = tree.groups
    assert turns(group.prefix) == [("user", "Why?"), ("assistant", "Because."), ("user", "Really?")]
    assert group.replies == ("Yes.", "No.")
    assert turns(tree.threads[0].messages)[-1] == ("assistant", "Yes.")
    assert [len(prompt.messages) for prompt in tree.prompts] == [1, 3]


def test_hh_paragraphs_of_one_speaker_are_joined() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"
    (group,) = one("hh", {"chosen": text, "rejected": text + "d"}).groups
    assert turns(group.prefix) == [("user", "a\n\nb")]


def test_preference_in_its_three_shapes() -> None:
    plain = one("preference", {"prompt": "Why?", "chosen": "a", "rejected": "b"})
    answers = [[{"role": "assistant", "content": text}] for text in "ab"]
    chat = one("preference", {"prompt": CHAT[:1], "chosen": answers[0], "rejected": answers[1]})
    whole = one("preference", {"chosen": [CHAT[0], *answers[0]], "rejected": [CHAT[0], *answers[1]]})
    assert plain == chat == whole
    assert plain.groups[0].replies == ("a", "b")


def test_ranking() -> None:
    tree = one("ranking", {"prefixes": ["Why?", "Because.", "Really?"], "responses": ["a", "b", "a"]})
    assert tree.groups[0].replies == ("a", "b")
    assert turns(tree.groups[0].prefix) == [("user", "Why?"), ("assistant", "Because."), ("user", "Really?")]
    assert [turns(thread.messages) for thread in tree.threads] == [[("user", "Why?"), ("assistant", "Because.")]]


def test_messages_with_a_system_message_and_an_open_end() -> None:
    tree = one("messages", {"messages": [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "user", "content": "Really?"}]})
    assert turns(tree.threads[0].messages) == [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because.")]
    assert [turns(prompt.messages)[-1] for prompt in tree.prompts] == [("user", "Why?"), ("user", "Really?")]


def test_instruction_columns() -> None:
    tree = one("instruction", {"Frage": "Warum?", "Antwort": "Darum.", "n": 1}, prompt="Frage", response="Antwort")
    assert turns(tree.threads[0].messages) == [("user", "Warum?"), ("assistant", "Darum.")]
    alpaca = one("instruction", {"instruction": "Sum up.", "input": "A text.", "output": "Text.", "system": "Be brief."})
    assert turns(alpaca.threads[0].messages) == [("system", "Be brief."), ("user", "Sum up.\n\nA text."), ("assistant", "Text.")]


def test_instruction_context_is_a_label_of_the_answer() -> None:
    tree = one("instruction", {"instruction": "When?", "context": "It was 1815.", "response": "In 1815."})
    question, answer = tree.threads[0].messages
    assert (question.content, question.labels, answer.labels) == ("When?", None, Labels(context="It was 1815."))


def test_text_is_one_passage_for_sft_alone() -> None:
    trees, bad = read("text", {"text": "Once."}, {"text": "Twice.", "id": 3}, {"text": "Once."})
    assert not bad
    assert [turns(tree.threads[0].messages) for tree in trees] == [[("text", "Once.")], [("text", "Twice.")], [("text", "Once.")]]
    assert trees[0] == trees[2] and trees[0].tree_id != trees[1].tree_id
    assert not any(tree.groups or tree.prompts for tree in trees)
    assert turns(one("text", {"body": "Thrice."}, text="body").threads[0].messages) == [("text", "Thrice.")]


def test_rows_with_the_same_first_turn_are_one_tree() -> None:
    rows = [{"prompt": "Why?", "chosen": "a", "rejected": other} for other in ("b", "c", "b")]
    trees, bad = read("preference", *rows)
    assert not bad
    assert len(trees) == 1
    assert [group.replies for group in trees[0].groups] == [("a", "b"), ("a", "c")]
    assert len(trees[0].threads) == len(trees[0].prompts) == 1


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("hh", {"chosen": HH + "Yes.", "rejected": "\n\nHuman: How?\n\nAssistant: No."}, "differ before their last answer"),
        ("hh", {"chosen": HH + "Yes.", "rejected": HH + "Yes."}, "nothing to rank"),
        ("hh", {"chosen": "\n\nHuman: Why?", "rejected": "\n\nHuman: Why?"}, "does not end in an answer"),
        ("hh", {"chosen": HH + "Yes."}, "not an object with `chosen` and `rejected`"),
        ("preference", {"prompt": "Why?", "chosen": "a", "rejected": None}, "`rejected` is missing"),
        ("preference", {"prompt": " ", "chosen": "a", "rejected": "b"}, "`prompt` is empty"),
        ("ranking", {"prefixes": ["Why?"], "responses": ["a"]}, "nothing to rank"),
        ("ranking", {"prefixes": ["Why?", "So."], "responses": ["a", "b"]}, "do not end in a turn of the user"),
        ("ranking", {"prefixes": "Why?", "responses": ["a", "b"]}, "no list of texts"),
        ("messages", {"messages": [{"role": "wizard", "content": "x"}]}, "role 'wizard'"),
        ("messages", {"messages": [CHAT[0], CHAT[0]]}, "two user turns follow each other"),
        ("messages", {"messages": CHAT[1:]}, "begins with a user turn"),
        ("messages", {"messages": [{"role": "user", "content": "a\0b"}]}, "NUL byte"),
        ("messages", {"messages": []}, "no list of messages"),
        ("messages", ["Why?"], "not an object"),
        ("instruction", {"prompt": "Why?", "response": 3}, "`response` is no text"),
        ("instruction", {"prompt": "Why?", "response": "a", "system": "b\0"}, "`system` holds a NUL byte"),
        ("instruction", {"prompt": "Why?", "response": "a\udc00"}, "`response` holds half a character"),
        ("prompts", 3, "not a JSON string"),
        ("text", {"text": " "}, "`text` is empty"),
        ("text", {"text": 3}, "`text` is no text"),
        ("text", "Once.", "not an object with a `text`"),
    ],
)
def test_reasons(name: str, value: Any, reason: str) -> None:
    trees, bad = read(name, value)
    assert trees == []
    assert reason in bad[0].reason


def test_a_column_that_is_named_and_missing() -> None:
    _, bad = read("instruction", {"a": "x", "b": "y"}, columns={"prompt": "a", "response": "c"})
    assert bad[0].reason == "no column 'c' (data.columns.response); the row has a, b"


def test_columns_tell_the_format() -> None:
    assert format_of_columns({"prompt", "response"}) == "instruction"
    assert format_of_columns({"prompt", "chosen", "rejected"}) == "preference"
    assert format_of_columns({"prompt"}) == "prompts"
    assert format_of_columns({"text"}) == "text"
    assert format_of_columns(()) is None
