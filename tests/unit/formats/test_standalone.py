"""Formats whose rows stand alone: what each row gives, what is refused and why, and how rows meet in one tree."""

from __future__ import annotations

from typing import Any

import pytest

from app.formats import FORMATS, detect_format, format_of_columns
from app.formats.records import STORED, BadRow, Filters, Labels, Row, TreeRecords
from app.formats.screening import phrases_of

HH = "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant: "
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def read(name: str, *values: Any, **options: Any) -> tuple[list[TreeRecords], list[BadRow]]:
    rows = [Row("f", line, repr(value), value) for line, value in enumerate(values, 1)]
    found = list(FORMATS[name].read(rows, Filters(**options)))
    return [item for item in found if isinstance(item, TreeRecords)], [item for item in found if isinstance(item, BadRow)]


def one(name: str, value: Any, **columns: str | tuple[str, ...]) -> TreeRecords:
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
    assert [prompt.reference for prompt in tree.prompts] == ["Because.", "Yes."]


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
    assert [prompt.reference for prompt in tree.prompts] == ["Because.", "a"]
    assert turns(tree.groups[0].prefix) == [("user", "Why?"), ("assistant", "Because."), ("user", "Really?")]
    assert [turns(thread.messages) for thread in tree.threads] == [[("user", "Why?"), ("assistant", "Because.")]]


def test_messages_with_a_system_message_and_an_open_end() -> None:
    tree = one("messages", {"messages": [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "user", "content": "Really?"}]})
    assert turns(tree.threads[0].messages) == [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because.")]
    assert [turns(prompt.messages)[-1] for prompt in tree.prompts] == [("user", "Why?"), ("user", "Really?")]
    assert [prompt.reference for prompt in tree.prompts] == ["Because.", None]


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
    assert len({tree.tree_id for tree in trees}) == 1
    assert [tree.groups[0].replies for tree in trees] == [("a", "b"), ("a", "c"), ("a", "b")]
    assert trees[0].threads == trees[1].threads


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
    assert bad[0].reason == "data.columns.response: no column 'c'; the row has a, b"


def test_columns_tell_the_format() -> None:
    assert format_of_columns({"prompt", "response"}) == "instruction"
    assert format_of_columns({"prompt", "chosen", "rejected"}) == "preference"
    assert format_of_columns({"prompt"}) == "prompts"
    assert format_of_columns({"text"}) == "text"
    assert format_of_columns(()) is None


def test_paths_and_templates_as_columns() -> None:
    row = {"context": "Rain falls.", "question": "What falls?", "answers": {"text": ["Rain", "rain"]}, "n": 3, "parts": ["a", "b"]}
    tree = one("instruction", row, prompt="{context}\n\n{question} ({n}, {parts})", response="answers.text.1")
    assert turns(tree.threads[0].messages) == [("user", "Rain falls.\n\nWhat falls? (3, a b)"), ("assistant", "rain")]
    dotted = {"a.b": "Why?", "a": {"b": "How?"}, "c": "So."}
    assert one("instruction", dotted, prompt="a.b", response="c").prompts[0].messages[0].content == "Why?"


def test_a_column_has_one_meaning() -> None:
    row = {"instruction": "Be brief.", "input": "Why?", "output": "So."}
    for prompt in ("input", "{input}"):
        tree = one("instruction", row, system="instruction", prompt=prompt, response="output")
        assert turns(tree.threads[0].messages) == [("system", "Be brief."), ("user", "Why?"), ("assistant", "So.")]


def test_replies_ranked_by_scores() -> None:
    columns = {"prompt": "q.full", "responses": ("a", "b", "c"), "scores": ("sa", "sb", "sc")}
    row = {"q": {"full": "Why?"}, "a": "worse", "b": "better", "c": "as good", "sa": -0.5, "sb": 0.5, "sc": 0.5}
    (group,) = one("ranking", row, **columns).groups
    assert group.replies == ("better", "worse")
    _, bad = read("ranking", row | {"sa": 0.5}, row | {"sb": None}, row | {"sb": float("nan")}, columns=columns)
    assert [row.reason.split(":")[0] for row in bad] == [
        "all replies have one score",
        *["`scores` does not hold one number for each of 3 replies"] * 2,
    ]


def test_the_best_of_unranked_replies() -> None:
    row = {"ctx": "He sat", "endings": ["down", "up", "on", "in"], "label": "2"}
    columns = {"prompt": "ctx", "responses": "endings", "best": "label"}
    groups = [one("ranking", row | {"label": label}, **columns).groups[0] for label in ("2", 2, 2)]
    assert groups[0] == groups[1] == groups[2]
    assert groups[0].replies[0] == "on"
    assert groups[0].replies[1] in {"down", "up", "in"}
    _, bad = read("ranking", *(row | {"label": label} for label in (4, -1, True, "", None)), columns=columns)
    assert len(bad) == 4  # without a label the order counts
    assert all("`best` is" in row.reason for row in bad)


def test_augmented_replies_stay_beside_the_ranked_ones() -> None:
    (group,) = one("ranking", {"prefixes": ["Why?"], "responses": ["a", "b"], "augmented": ["x", "y"], "split": "train"}).groups
    assert (group.replies, group.augmented, group.pairs) == (("a", "b"), ("x", "y"), 1)


@pytest.mark.parametrize(
    "value",
    [
        ["Why?", "Because.", "Really?", "Yes."],
        "User: Why?\nAssistant: Because.\nUser: Really?\nAssistant: Yes.",
        "\n<human>: Why?\n<bot>: Because.\n<human>: Really?\n<bot>: Yes.",
        [{"input": "Why?", "output": "Because."}, {"input": "Really?", "output": "Yes."}],
        [
            {"role": r, "content": c, "from": None}
            for r, c in zip(["user", "assistant"] * 2, ["Why?", "Because.", "Really?", "Yes."], strict=True)
        ],
    ],
)
def test_messages_in_all_their_shapes(value: Any) -> None:
    expected = [("user", "Why?"), ("assistant", "Because."), ("user", "Really?"), ("assistant", "Yes.")]
    assert turns(one("messages", {"messages": value}).threads[0].messages) == expected
    named = one("messages", {"talk": value, "rules": "Be brief."}, messages="talk", system="rules")
    assert turns(named.threads[0].messages) == [("system", "Be brief."), *expected]


def test_a_transcript_of_many_lines_is_read_in_time() -> None:
    (tree,), _ = read("messages", {"messages": "User: Why?" + "\n" * 300_000 + "Assistant: a" + "\nAssistant: b" * 100_000})
    assert tree.threads[0].messages[-1].content.startswith("a\n\nb\n\nb")


def test_phrases_leave_rows_out() -> None:
    phrases = phrases_of(["refusals", "Ahoy"])
    row = {"prompt": "Why?", "chosen": "So, AHOY.", "rejected": "No."}
    answers = ["I’m sorry, but I can't assist with that.", "As an AI language model, I...", "Because.", "ahoy"]
    _, bad = read("instruction", *({"prompt": "As an AI language model?", "response": text} for text in answers), phrases=phrases)
    assert [(row.line, row.malformed) for row in bad] == [(1, False), (2, False), (4, False)]
    assert bad[2].reason == "an answer holds 'ahoy' (data.phrases)"
    trees, bad = read("preference", row, {**row, "chosen": "Yes.", "rejected": "Ahoy"}, phrases=phrases)
    assert (len(trees), len(bad)) == (1, 1)


def test_a_huge_message_is_set_aside_and_its_text_cut() -> None:
    _, (bad,) = read("instruction", {"prompt": "Why?", "response": "x" * 10_000_000})
    assert bad.reason == "a message has 10000000 characters, and data.max_characters is 1000000"
    assert len(bad.text) < 2 * STORED
    (tree,), _ = read("instruction", {"prompt": "Why?", "response": "x" * 2_000_000}, max_characters=2_000_000)
    assert len(tree.threads[0].messages[1].content) == 2_000_000


@pytest.mark.parametrize(
    ("name", "value", "columns", "reason"),
    [
        ("hh", {"c": HH + "Yes.", "r": HH + "No."}, {"chosen": "c"}, "`rejected` is missing"),
        ("instruction", {"q": "Why?", "a": {"text": []}}, {"prompt": "q", "response": "a.text.0"}, "no column 'a.text.0': nothing at '0'"),
        ("instruction", {"q": "Why?", "a": "x"}, {"prompt": "{q} {b}", "response": "a"}, "data.columns.prompt: no column 'b'"),
        ("instruction", {"q": True, "a": "x"}, {"prompt": "{q}", "response": "a"}, "data.columns.prompt: `q` is no text"),
        ("instruction", {"q": " ", "a": "x"}, {"prompt": "Say {q}", "response": "a"}, "data.columns.prompt: `q` is empty"),
        ("instruction", {"prompt": "Why?", "response": 3}, {}, "`response` is no text"),
        ("instruction", {"prompt": "Why?", "response": "a\ud800"}, {}, "`response` holds half a character"),
        ("instruction", {"prompt": "Why?", "input": "\0", "response": "a"}, {}, "`input` holds a NUL byte"),
        ("ranking", {"prefixes": ["Why?"], "responses": ["a", "b"], "augmented": "x"}, {}, "`augmented` is no list of texts"),
        ("messages", {"messages": "Hello.\nUser: Why?"}, {}, "does not begin with a turn"),
        ("messages", {"messages": "User:\nAssistant: a"}, {}, "turn 1 is empty"),
        ("messages", {"messages": [3]}, {}, "message 1 is no mapping"),
        ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, {}, "role ['user']"),
    ],
)
def test_more_reasons(name: str, value: Any, columns: dict[str, str], reason: str) -> None:
    trees, bad = read(name, value, columns=columns)
    assert trees == []
    assert reason in bad[0].reason


def test_deep_nesting_is_a_reason() -> None:
    role: list[Any] = []
    for _ in range(5000):
        role = [role]
    rows = [Row("f", 1, "", {"messages": [{"role": role, "content": "x"}]})]
    (bad,) = FORMATS["messages"].read(rows, Filters())
    assert isinstance(bad, BadRow)
    assert bad.reason == "nested too deeply"
