"""Trees to rank: shape, limits, repeatability, and that nothing trains on them yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.config.data import DataConfig
from app.data.corpus import QUARANTINE, load_corpus
from app.evaluation.sampling_report import PromptResults, SamplingReport
from app.evaluation.synthetic_trees import synthetic_trees
from app.formats.records import Message
from tests.unit.evaluation.reports import report

SFT = report({"Why?": {"k50": ["a", "b "], "greedy": ["a"]}, "How?": {"greedy": ["a", "NUL \0"]}})
PPO = report({"Why?": {"k50": ["b", "c", " "]}, "When?": {"k50": list("abcdefgh")}}, "runs/ppo/model")


def replies(tree: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tree["prompt"]["replies"]
    return found


def test_answers_of_all_reports_meet_without_duplicates() -> None:
    made = synthetic_trees([SFT, PPO])
    assert made.left_out == {"fewer than two distinct answers": 1}
    why, when = made.trees
    assert why["tree_state"] == "ranking"
    assert why["message_tree_id"] == why["prompt"]["message_id"]
    assert [reply["text"] for reply in replies(why)] == ["a", "b", "c"]
    assert [reply["model_name"] for reply in replies(why)] == ["runs/sft/model,top_k=50"] * 2 + ["runs/ppo/model,top_k=50"]
    assert all(reply["synthetic"] and reply["parent_id"] == why["message_tree_id"] for reply in replies(why))
    assert not why["prompt"]["synthetic"]
    assert len(replies(when)) == 5
    assert {reply["text"] for reply in replies(when)} < set("abcdefgh")


def test_the_same_reports_give_the_same_trees() -> None:
    assert synthetic_trees([SFT, PPO]).trees == synthetic_trees([SFT, PPO]).trees
    drawn = {json.dumps(synthetic_trees([PPO], seed=seed, max_replies=2).trees[-1]) for seed in range(8)}
    assert len(drawn) > 1


def test_earlier_turns_stand_above_the_answers() -> None:
    turns = (Message("user", "Why?"), Message("assistant", "So."), Message("user", "Sure?"))
    result = SFT.prompts[0].results[0]
    asked = [PromptResults.of(turns, [result]), PromptResults.of((Message("system", "Be brief."), *turns), [result])]
    made = synthetic_trees([SamplingReport(model_name="m", date="", args={}, prompts=tuple(asked))])
    assert made.left_out == {"the format has no system message": 1}
    (tree,) = made.trees
    (earlier,) = replies(tree)
    assert (earlier["text"], earlier["synthetic"]) == ("So.", False)
    assert [reply["role"] for reply in earlier["replies"][0]["replies"]] == ["assistant"] * 2


def test_our_reader_takes_them_and_trains_nothing_on_them(tmp_path: Path) -> None:
    file = tmp_path / "trees.jsonl"
    file.write_text("".join(json.dumps(tree) + "\n" for tree in synthetic_trees([SFT, PPO]).trees))
    corpus = load_corpus(DataConfig(path=str(file)), seed=0, folder=tmp_path, split=False)
    assert (corpus.format, corpus.quarantined, (tmp_path / QUARANTINE).exists()) == ("oasst", 0, False)
    assert corpus.counts == {"trees": 2, "messages": 4 + 6, "threads": 0, "groups": 0, "pairs": 0, "prompts": 0}
