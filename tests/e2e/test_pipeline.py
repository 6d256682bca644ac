"""What the main job leaves, and what it learns, after it was interrupted and resumed (see conftest.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from app.config.loading import load_recipe
from app.data.baselines import bag_of_words_baseline, best_constant_answer, pair_accuracy
from app.data.corpus import load_corpus
from app.data.embedded import gold_score
from app.data.encoding import Cuts, encode_groups
from app.data.templates import build_template
from app.formats.records import Message
from app.kept_rollouts import kept_steps, read_step
from app.models.forward import pad_sequences
from app.models.heads import load_reward_model, sequence_scores
from app.models.load import load_tokenizer
from app.stages.ppo import prompt_sets
from app.stages.preparation import Prepared
from jobs.main import main
from tests.e2e.command import SHRUNKEN, run


def test_summary_has_what_tools_rely_on(summary: dict[str, Any]) -> None:
    assert {"pair_accuracy", "kendall_tau", "score_gap", "calibration_error", "length_baseline", "reward_offset"} <= set(summary["rm"])
    assert {"reward_before", "reward_after", "gold_before", "gold_after", "gold_gain", "win_rate", "kl"} <= set(summary["ppo"])
    for name in ("gold_gain", "win_rate", "reward_after"):
        interval = summary["ppo"][name]
        assert interval["low"] <= interval["mean"] <= interval["high"]
    assert summary["ppo"]["steps"] == 10
    assert summary["ppo"]["tokens_per_second"] > 0
    assert set(summary["seconds"]) == {"sft", "rm", "ppo"}
    assert 2**30 < summary["peak_memory"] < 8 * 2**30


def test_engine_and_learner_agree_after_every_push(summary: dict[str, Any]) -> None:
    assert 0 < summary["ppo"]["max_logprob_mismatch"] <= 1e-3


def test_it_learns(summary: dict[str, Any]) -> None:
    assert summary["sft"]["eval_loss_after"] < 0.5 * summary["sft"]["eval_loss_before"]
    assert summary["rm"]["pair_accuracy"] > summary["rm"]["length_baseline"] + 0.15
    assert summary["ppo"]["reward_after"]["mean"] > summary["ppo"]["reward_before"]["mean"]
    assert summary["ppo"]["gold_gain"]["low"] > 0


def test_the_task_is_worth_learning(finished: Path, summary: dict[str, Any]) -> None:
    """The reward model reads the prompt: with prompts exchanged it is lost, and the answer's words alone do not tell."""
    recipe = load_recipe(SHRUNKEN)
    corpus = load_corpus(recipe.data, seed=recipe.run.seed, folder=finished / "data")
    groups = corpus.validation.groups
    template = build_template("auto", load_tokenizer(finished / "rm" / "model"))
    model = load_reward_model(str(finished / "rm" / "model"))

    def accuracy(prefixes: Sequence[tuple[Message, ...]]) -> float:
        moved = [replace(group, prefix=prefix) for group, prefix in zip(groups, prefixes, strict=True)]
        scores = []
        for row in encode_groups(moved, template, recipe.data, recipe.run.seed, Cuts()):
            with torch.no_grad():
                scores.append(sequence_scores(model, *pad_sequences(row.sequences)).tolist())
        return pair_accuracy(scores)

    own = [group.prefix for group in groups]
    assert accuracy(own) == pytest.approx(summary["rm"]["pair_accuracy"], abs=2e-3)
    assert accuracy(own[7:] + own[:7]) <= 0.60
    assert bag_of_words_baseline(corpus.train.groups, groups) <= summary["rm"]["pair_accuracy"] - 0.10
    answers = [reply for group in groups[:50] for reply in group.replies]
    assert best_constant_answer(groups, answers, gold_score)[1] < summary["ppo"]["gold_before"]["mean"]


def test_sft_answers_score_about_zero(summary: dict[str, Any]) -> None:
    spread = summary["ppo"]["reward_before"]["high"] - summary["ppo"]["reward_before"]["low"]
    assert abs(summary["ppo"]["reward_before"]["mean"]) < 3 * spread


def test_plain_transformers_loads_every_model(finished: Path) -> None:
    for stage in ("sft", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(finished / stage / "model")
        tokenizer = AutoTokenizer.from_pretrained(finished / stage / "model")
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        assert torch.isfinite(model(ids).logits).all()
    reward = AutoModelForSequenceClassification.from_pretrained(finished / "rm" / "model")
    assert reward(ids).logits.shape == (1, 1)
    assert reward.config.reward_offset != 0


def test_the_newest_checkpoint_exports_as_the_finished_model(finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished / "ppo" / "checkpoints"), "--output", str(tmp_path / "model")]) == 0
    exported, model = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", finished / "ppo" / "model"))
    assert exported.keys() == model.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in model.items())


def test_every_session_went_to_one_run_of_the_tracking_service(finished: Path) -> None:
    (run_id,) = json.loads((finished / "tracking.json").read_text()).values()
    assert [file.name for file in finished.glob("wandb/offline-run-*/*.wandb")] == [f"run-{run_id}.wandb"] * 3


def test_lineage(finished: Path) -> None:
    stages = {stage: json.loads((finished / stage / "manifest.json").read_text()) for stage in ("sft", "rm", "ppo")}
    assert stages["rm"]["parents"]["sft"] == stages["sft"]["sha256"]
    assert stages["ppo"]["parents"] == {
        "data": stages["sft"]["parents"]["data"],
        "sft": stages["sft"]["sha256"],
        "rm": stages["rm"]["sha256"],
    }


def test_report_and_metrics(finished: Path) -> None:
    report = (finished / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "https://" not in report
    assert list((finished / "tensorboard").iterdir())


def test_every_prompt_was_used_once_and_in_order(finished: Path) -> None:
    """Over three sessions, of which one lost its driver: it ended without a word, and the next one did its last step again."""
    manifest = json.loads((finished / "manifest.json").read_text())
    assert [session.get("outcome") for session in manifest["sessions"][:3]] == ["interrupted", None, "finished"]
    logged = [step for stage, step in points(finished) if stage == "ppo"]
    assert sorted(set(logged)) == list(range(1, 11)) and len(logged) > 10
    recipe = load_recipe(SHRUNKEN)
    corpus = load_corpus(recipe.data, seed=recipe.run.seed, folder=finished / "data")
    template = build_template("auto", load_tokenizer(finished / "sft" / "model"))
    stream = prompt_sets(recipe, Prepared(corpus, "", None, template)).train
    planned = [prompt.id for prompt in stream.take(0, 10 * recipe.ppo.batch_size, seed=recipe.run.seed)]
    steps = [read_step(finished / "ppo" / "rollouts", step)[0] for step in range(1, 11)]
    assert [rollout.prompt.id for step in steps for rollout in step.rollouts] == planned
    assert len(set(planned)) == len(planned)


def points(run: Path) -> list[tuple[str, int]]:
    """(stage, step) of every line of its metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines]


def test_kept_rollouts_replay_to_what_was_logged(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the steps on both sides of the interruptions."""
    assert kept_steps(finished / "ppo" / "rollouts") == list(range(1, 11))
    for step in (1, 2, 3, 10):
        assert main(["replay", str(finished), str(step)]) == 0
    assert "start/value_loss" in capsys.readouterr().out


def test_a_finished_run_is_left_alone(finished: Path, tmp_path: Path) -> None:
    before = (finished / "ppo" / "manifest.json").read_bytes()
    code, output = run(["pipeline", SHRUNKEN, f"--run.dir={finished}"], tmp_path / "log")
    assert code == 0, output
    assert "ppo: already finished" in output
    assert (finished / "ppo" / "manifest.json").read_bytes() == before


def test_another_config_is_refused(finished: Path, tmp_path: Path) -> None:
    code, output = run(["pipeline", SHRUNKEN, f"--run.dir={finished}", "--ppo.kl.coef=0.5"], tmp_path / "log")
    assert code == 2
    assert output.splitlines()[-1].startswith("corral: error: run folder")
    assert "ppo.kl.coef" in output
