"""Reports: keys, what is no report, and the pooling of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import DataError
from app.evaluation.sampling_report import PromptResults, pool, read_report
from app.formats.records import Message
from tests.unit.evaluation.reports import as_json, report


def test_keys_are_those_of_open_assistant(tmp_path: Path) -> None:
    document = as_json({"Why?": {"k50": ["a", "b"], "greedy": ["c"]}})
    file = tmp_path / "report.json"
    file.write_text(json.dumps(document | {"prompts": [document["prompts"][0] | {"unknown": 1}]}))
    assert read_report(file).as_json() == document


def test_a_conversation_comes_back() -> None:
    turns = (Message("system", "Be brief."), Message("user", "Why?"), Message("assistant", "So."), Message("user", "Sure?"))
    several = PromptResults.of(turns, ())
    assert several.prompt == "Sure?"
    assert several.conversation == turns
    alone = PromptResults.of(turns[1:2], ())
    assert alone.messages is None
    assert alone.conversation == turns[1:2]


def test_pooling_joins_configurations_and_reports() -> None:
    first = report({"Why?": {"k50": ["a", "b"], "greedy": ["a"]}, "How?": {"k50": []}})
    second = report({"Why?": {"k50": ["c"]}, "When?": {"k50": ["d"]}}, "runs/ppo/model")
    pooled = {conversation[-1].content: answers for conversation, answers in pool([first, second]).items()}
    assert {prompt: [answer.text for answer in answers] for prompt, answers in pooled.items()} == {
        "Why?": ["a", "b", "a", "c"],
        "When?": ["d"],
    }
    assert [(answer.model_name, answer.config) for answer in pooled["Why?"][2:]] == [
        ("runs/sft/model", "greedy"),
        ("runs/ppo/model", "k50"),
    ]


@pytest.mark.parametrize(
    ("document", "part"),
    [
        ("{", "no valid JSON"),
        ("[]", "no sampling report"),
        ('{"prompts": []}', "model_name: Field required"),
        (json.dumps(as_json({})), "no prompt in it has an output"),
        (json.dumps(as_json({"Why?": {"k50": []}})), "no prompt in it has an output"),
        (json.dumps(as_json({"Why?": {}}) | {"prompts": [{"prompt": "Why?"}]}), r"prompts.0.results: Field required"),
        (json.dumps(as_json({}) | {"prompts": [{"prompt": "a", "messages": [], "results": []}]}), "turn of the user"),
    ],
)
def test_what_is_no_report(tmp_path: Path, document: Any, part: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(document)
    with pytest.raises(DataError, match=f"report.json: .*{part}"):
        read_report(file)


def test_a_missing_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.json: cannot be read \(No such file"):
        read_report(tmp_path / "nowhere.json")
