"""`corral score`: a real tiny reward model and language model over conversations of every format, and deaths at every moment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from app.config.data import SetConfig
from app.config.loading import load_recipe
from app.config.serving import ModelKind
from app.data.templates import build_template
from app.errors import ConfigError, DataError, Interrupted, ModelError
from app.evaluation import offline_scoring
from app.evaluation.offline_scoring import Job, score_replies, stored
from app.evaluation.reply_records import open_replies, read_replies
from app.formats.records import Message
from app.models.forward import pad_sequences, sequence_logprobs
from app.models.heads import load_reward_model, sequence_scores
from app.models.load import load_causal_lm, load_tokenizer
from app.models.scoring import ScoringModel, kind_of
from tests.tiny_models import CONTEXT, make_neox, make_reward_model

OFFSET = 0.25
ROWS = [
    {
        "messages": [
            {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
        ]
    },
    {"messages": [{"role": "user", "content": "nobody answered"}]},
    {"messages": [{"role": "elephant", "content": "x"}]},
    *({"messages": [{"role": "user", "content": f"q{k}"}, {"role": "assistant", "content": "so " * (5 * k)}]} for k in range(1, 12)),
]
TREE = {
    "message_tree_id": "t",
    "prompt": {
        "message_id": "t",
        "role": "prompter",
        "text": "Why?",
        "lang": "en",
        "review_result": True,
        "replies": [
            {"message_id": "best", "role": "assistant", "text": "Because.", "rank": 0, "replies": [
                {"message_id": "more", "role": "prompter", "text": "And?", "replies": [
                    {"message_id": "end", "role": "assistant", "text": "So."}]}]},
            {"message_id": "worse", "role": "assistant", "text": "Dunno.", "rank": 1},
        ],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A reward model and a language model."""
    folder = tmp_path_factory.mktemp("models")
    ref = make_neox(folder / "lm")
    return {"rm": make_reward_model(folder / "rm", ref, reward_offset=OFFSET), "ref": ref}


@pytest.fixture
def job(models: dict[str, str], tmp_path: Path) -> Callable[..., Job]:
    """A job over rows of one file, with an output of its own."""

    def make(rows: Sequence[Any] = ROWS, output: str = "scores.parquet", options: Sequence[str] = (), **more: Any) -> Job:
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = load_recipe(None, [f"--data.path={tmp_path / 'data.jsonl'}", f"--data.max_length={CONTEXT}", *options])
        return Job(recipe, **{"models": models, "output": tmp_path / output, "part_rows": 5} | more)

    return make


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was loaded for one job serves the next."""
    monkeypatch.setattr(offline_scoring, "load_scorer", lambda path, recipe, kind: _loaded(path, kind))


@cache
def _loaded(path: str, kind: ModelKind) -> ScoringModel:
    return ScoringModel(path, kind)


def test_every_row_is_the_direct_forward_pass(job: Callable[..., Job], models: dict[str, str]) -> None:
    summary = score_replies(job(texts=True))
    rows = pq.read_table(summary["output"]).to_pylist()
    template = build_template("auto", load_tokenizer(models["rm"]))
    reward, reference = load_reward_model(models["rm"]), load_causal_lm(models["ref"])
    assert [row["row"] for row in rows] == list(range(12))
    assert [row["line"] for row in rows] == [1, *range(4, 15)]
    for row in rows:
        prompt, _ = template.encode([Message(**message) for message in row["messages"]], open_assistant=True)
        reply = [*template.encode_text(row["text"]), template.eos_id]
        length = len(prompt) + len(reply)
        assert (
            (row["tokens_rm"], row["truncated_rm"]) == (row["tokens_ref"], row["truncated_ref"]) == (min(length, CONTEXT), length > CONTEXT)
        )
        if length > CONTEXT:
            continue
        batch = pad_sequences([np.array(prompt + reply, np.int32)])
        with torch.no_grad():
            logprobs = sequence_logprobs(reference, *batch)[0, -len(reply) :].double()
            assert row["score_rm"] == pytest.approx(float(sequence_scores(reward, *batch)) - OFFSET, abs=1e-5)
        assert row["logprob_sum_ref"] == pytest.approx(float(logprobs.sum()), abs=1e-4)
        assert row["logprob_mean_ref"] == pytest.approx(float(logprobs.mean()), abs=1e-5)
    assert 0 < sum(row["truncated_rm"] for row in rows) == summary["models"]["rm"]["truncated"] < 12
    scores = np.array([row["score_rm"] for row in rows])
    assert summary["models"]["rm"]["score"] == pytest.approx({"mean": scores.mean(), "std": scores.std()})
    (of_file,) = summary["models"]["rm"]["files"].values()
    assert of_file == {"replies": 12, "score": summary["models"]["rm"]["score"]}


def test_rows_that_give_no_reply_are_counted(job: Callable[..., Job]) -> None:
    scored = job()
    summary = score_replies(scored)
    assert {name: summary[name] for name in ("rows", "replies", "without_reply", "quarantined")} == {
        "rows": 14,
        "replies": 12,
        "without_reply": 1,
        "quarantined": 1,
    }
    (entry,) = map(json.loads, scored.quarantine.read_text().splitlines())
    assert entry["line"] == 3 and "elephant" in entry["reason"]
    with pytest.raises(DataError, match="no reply to score: no row of it has one"):
        score_replies(job(ROWS[1:2], "prompts.parquet"))
    with pytest.raises(DataError, match=r"no reply to score: 1 rows cannot be used \(first: .*elephant"):
        score_replies(job(ROWS[2:3], "bad.parquet"))
    with pytest.raises(DataError, match=r"data.jsonl:3: .*elephant"):
        score_replies(job(output="strict.parquet", options=["--data.strict=true"]))


def test_replies_of_every_format(tmp_path: Path) -> None:
    def replies(*rows: Any, every_turn: bool = False) -> list[tuple[int, int, str]]:
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = SetConfig(path=str(tmp_path / "data.jsonl"), max_characters=100)
        count = read_replies(source, tmp_path / "out", tmp_path / "bad.jsonl", every_turn=every_turn, strict=True).replies
        records = open_replies(tmp_path / "out").chosen(np.ones(count, np.bool_))
        return [(reply.line, reply.reply, reply.text) for reply in records]

    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    assert replies(pair, pair) == [(1, 0, "good"), (1, 1, "bad"), (2, 0, "good"), (2, 1, "bad")]
    ranked = {"prompt": "p", "responses": ["1st", "2nd", "3rd"], "augmented": ["4th"]}
    assert replies(ranked) == [(1, 0, "1st"), (1, 1, "2nd"), (1, 2, "3rd"), (1, 3, "4th")]
    assert replies({"instruction": "i", "response": "r"}) == [(1, 0, "r")]
    assert replies(ROWS[0]) == [(1, 0, "d")]
    assert replies(ROWS[0], every_turn=True) == [(1, 0, "b"), (1, 1, "d")]
    assert replies(TREE) == [(1, 0, "Because."), (1, 1, "Dunno."), (1, 2, "So.")]


class Death(BaseException):
    """What nothing catches, as SIGKILL."""


def test_death_at_any_write_changes_nothing(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    straight, again = job(output="straight.parquet"), job(output="again.parquet")
    score_replies(straight)
    replace, deaths, left = os.replace, 0, 0

    def mortal(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Death
        replace(source, target)

    monkeypatch.setattr(os, "replace", mortal)
    while not again.output.exists():
        left = deaths  # at the first file, at the second, ...
        try:
            score_replies(again)
        except Death:
            deaths += 1
    assert deaths >= 4
    assert again.output.read_bytes() == straight.output.read_bytes()
    assert not again.work.exists()


def test_an_interrupt_says_that_the_same_command_goes_on(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ScoringModel, "answers", interrupted)
        with pytest.raises(Interrupted, match=r"scores\.parquet\.parts holds what is scored"):
            score_replies(job())
    assert score_replies(job())["replies"] == 12


def test_what_is_there_belongs_to_what_is_asked_for(
    job: Callable[..., Job], models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = job()
    summary = score_replies(first)
    written = first.output.stat().st_mtime_ns
    first.work.mkdir()
    assert score_replies(first) == summary and first.output.stat().st_mtime_ns == written, "finished: shown again"
    assert not first.work.exists(), "left by a death after the last write"
    assert stored(first.output)["weights"] == {name: _loaded(path, kind_of(path)).weights_hash for name, path in models.items()}
    others = [
        ({"rows": ROWS[:-1]}, "the source has changed since"),
        ({"models": {"rm": models["rm"]}}, "the models are others"),
        ({"options": ["--data.template=oasst"]}, "data.template or data.max_length"),
        ({"every_turn": True}, "--every-turn"),
        ({"texts": True}, "--texts"),
        ({"options": ["--scoring.max_batch_tokens=64"]}, "scoring.max_batch_tokens"),
    ]
    for change, reason in others:
        with pytest.raises(ConfigError, match=f"scores.parquet holds other scores: .*{reason}"):
            score_replies(job(**change))
    first.output.unlink()
    monkeypatch.setattr("app.evaluation.offline_scoring._assemble", lambda *_: (_ for _ in ()).throw(Death))
    with pytest.raises(Death):
        score_replies(job())
    for change, reason in others[:2]:
        with pytest.raises(ConfigError, match=f"scores.parquet.parts holds other scores: .*{reason}"):
            score_replies(job(**change))
    first.output.write_text("mine")
    with pytest.raises(ConfigError, match="is there already, and no file of `corral score`"):
        score_replies(job())
    with pytest.raises(ModelError, match="no such folder"):
        score_replies(job(models={"": "owner/name"}))
