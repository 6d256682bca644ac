"""SFT and reward model on real Ray Train with real gloo workers: learning, exactness over layouts, interruption, export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from app.config.recipe import Recipe
from app.config.shared import DeepSpeedConfig, OptimizerConfig, WorkersConfig
from app.config.training import SftConfig, TrainingConfig
from app.data.corpus import Corpus, Source, Split
from app.data.mixture import Mixture
from app.data.templates import build_template
from app.errors import Interrupted, NonFiniteError
from app.formats.records import Message, RankedGroup, Thread
from app.run_folder import RunFolder
from app.stages.preparation import Prepared
from app.stages.reward_model import set_reward_offset, train_reward_model
from app.stages.sft import train_sft
from app.tasks.sft import SftTask
from app.workers.training import fit
from tests.tiny_models import make_neox, make_tokenizer

STEPS = 6
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-4, schedule="linear", warmup_steps=1, max_grad_norm=0.5)
SHAPE = {"epochs": 2, "max_steps": STEPS, "batch_size": 8, "log_every": 1, "eval_every": 4, "save_every": 100, "optimizer": OPTIMIZER}
SMALL_WORKER = {"cpus": 0.5}


@dataclass
class Curve:
    """Stands in for a RunTracker: keeps what is compared, by step."""

    losses: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def begin(self, stage: str, total_steps: int) -> None:
        self.names.add(f"{stage}/{total_steps}")

    def end(self, stage: str) -> None: ...

    def note(self, text: str) -> None: ...

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.names |= metrics.keys()
        if "loss" in metrics:
            self.losses[step], self.grad_norms[step] = metrics["loss"], metrics["grad_norm"]
        if "eval_loss" in metrics:
            self.held_out[step] = metrics["eval_loss"]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Questions of different lengths with one right answer each; wrong answers differ in it."""

    def user(number: int) -> Message:
        return Message("user", "hello " * (1 + number % 4) + str(number))

    def split(numbers: range) -> Split:
        answers = [Message("assistant", "good answer" + "!" * (n % 3)) for n in numbers]
        threads = tuple(Thread(f"t{n}", f"t{n}", (user(n), answer)) for n, answer in zip(numbers, answers, strict=True))
        replies = ("good answer", "so so, well", "bad", "cut off by max_replies")
        groups = tuple(RankedGroup(f"g{n}", f"g{n}", (user(n),), replies) for n in numbers)
        return Split(threads, groups, ())

    source = Source(Path("corpus"), "oasst", 50, {}, {}, 0, 0, "0" * 64)
    return Corpus(split(range(37)), split(range(37, 50)), {"data": source})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_neox(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def prepared(corpus: Corpus, base: str) -> Prepared:
    return Prepared(corpus, base, None, build_template("chat", make_tokenizer()))


@dataclass(frozen=True)
class SftRun:
    recipe: Recipe
    folder: RunFolder
    results: dict[str, float]
    curve: Curve


@pytest.fixture(scope="module")
def sft(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> SftRun:
    """One worker, one micro-batch of 8."""
    recipe = Recipe.model_validate(
        {
            "run": {"dir": str(tmp_path_factory.mktemp("runs") / "run")},
            "data": {"max_length": 64},
            "sft": {**SHAPE, "micro_batch_size": 8, "workers": SMALL_WORKER},
            "rm": {
                **SHAPE,
                "max_steps": 12,
                "epochs": 4,
                "micro_batch_size": 2,
                "eval_every": 6,
                "keep_best": True,
                "max_replies": 3,
                "workers": {**SMALL_WORKER, "count": 2},
            },
        }
    )
    run = RunFolder.open(recipe, "pipeline")
    curve = Curve()
    results = train_sft(recipe, run, curve, prepared)
    run.finish("sft", results, {})
    return SftRun(recipe, run, results, curve)


def fit_again(sft: SftRun, base: str, folder: Path, curve: Curve, *, stop: bool = False, packing: bool = True, **layout: object) -> None:
    """The SFT run in another layout of workers, micro-batches and rows."""
    config = TrainingConfig.model_validate({**SHAPE, **layout})
    task = SftTask(sft.folder.path / "sft" / "data", base, "fp32", False, SftConfig(packing=packing))
    fit(
        task, config, steps=STEPS, mixture=Mixture.of(["data"] * 37, {}), precision="fp32", seed=sft.recipe.run.seed, folder=folder,
        tracker=curve,
        deadline_seconds=300, stop_requested=lambda: stop,
    )  # fmt: skip


def assert_same_curve(curve: Curve, expected: Curve) -> None:
    """Losses, held-out losses and gradient norms agree to 1e-5 in every step."""
    for name in ("losses", "held_out", "grad_norms"):
        got, want = getattr(curve, name), getattr(expected, name)
        assert got.keys() == want.keys()
        assert list(got.values()) == pytest.approx(list(want.values()), rel=1e-5)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_sft_learns(sft: SftRun) -> None:
    assert sft.results["eval_loss_after"] < 0.7 * sft.results["eval_loss_before"]
    assert sft.results["steps"] == STEPS
    assert sft.results["tokens"] > 0
    assert sorted(sft.curve.losses) == list(range(1, STEPS + 1))
    assert sorted(sft.curve.held_out) == [0, 4, STEPS]
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "epoch", "eval_loss", f"sft/{STEPS}"} <= sft.curve.names


def test_sft_folder_is_plain_transformers(sft: SftRun, base: str) -> None:
    folder = sft.folder.path / "sft" / "model"
    after, before = weights(folder), weights(Path(base))
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert list(folder.glob("*.safetensors"))


def test_two_sharded_workers_train_like_one(sft: SftRun, base: str, tmp_path: Path) -> None:
    curve = Curve()
    workers, zero3 = WorkersConfig(count=2, cpus=0.5), DeepSpeedConfig(zero_stage=3)
    fit_again(sft, base, tmp_path, curve, micro_batch_tokens=160, workers=workers, deepspeed=zero3)
    assert_same_curve(curve, sft.curve)
    sharded, single = weights(tmp_path / "model"), weights(sft.folder.path / "sft" / "model")
    largest = max(float(tensor.abs().max()) for tensor in single.values())
    assert max(float((sharded[name] - single[name]).abs().max()) for name in single) <= 1e-5 * largest


def test_accumulation_with_a_stop_in_the_middle_trains_like_one_batch(
    sft: SftRun, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.workers.training.START_GRACE_SECONDS", 300.0)  # the request is there before the workers are
    layout = {"micro_batch_size": 2, "workers": WorkersConfig(cpus=0.5)}
    curve = Curve()
    with pytest.raises(Interrupted, match="goes on from there"):
        fit_again(sft, base, tmp_path, curve, stop=True, packing=False, **layout)
    stopped = max(curve.losses)
    assert stopped < STEPS
    assert not (tmp_path / "model").exists()
    rest = Curve()
    fit_again(sft, base, tmp_path, rest, packing=False, **layout)
    assert min(rest.losses) == stopped + 1, "resumed from the checkpoint written at the stop"
    for name in ("losses", "held_out", "grad_norms"):
        getattr(curve, name).update(getattr(rest, name))
    assert_same_curve(curve, sft.curve)


def test_reward_model_learns_the_ranking(sft: SftRun, prepared: Prepared) -> None:
    run, model = sft.folder, sft.folder.path / "rm" / "model"
    curve = Curve()
    results = train_reward_model(sft.recipe, run, curve, prepared, sft_path=str(run.path / "sft" / "model"))
    kept = json.loads((model / "held_out.json").read_text())
    assert sorted(curve.held_out) == [0, 6, 12]
    assert results["loss"] == kept["metrics"]["loss"] == curve.held_out[kept["step"]] == min(curve.held_out.values())
    assert results["pair_accuracy"] >= 0.9
    assert results["best_vs_worst"] >= 0.9
    assert results["loss"] < results["loss_before"]
    assert results["kendall_tau"] >= 0.8
    assert results["score_gap"] == pytest.approx(results["best_score"] - results["worst_score"])
    assert {"eval_kendall_tau", "eval_spearman", "eval_calibration_error", "eval_mean_p_chosen"} <= curve.names
    # 11, 11 and 3 characters
    by_length = {"length_baseline": 2.5 / 3, "length_best_vs_worst": 1.0, "length_kendall_tau": 2 / 6**0.5, "length_spearman": 1.5 / 3**0.5}
    assert {name: results[name] for name in by_length} == pytest.approx(by_length)

    sequences = [np.array([2, 72, 105, 1, 3, *range(40, 40 + length), 1], np.int32) for length in (3, 9, 5)]
    offset = set_reward_offset(model, sequences, WorkersConfig(cpus=0.5), deadline_seconds=120)
    plain = AutoModelForSequenceClassification.from_pretrained(model)
    with torch.no_grad():
        raw = [float(plain(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits) for ids in sequences]
    assert offset == pytest.approx(sum(raw) / len(raw), abs=1e-5)
    assert plain.config.reward_offset == offset
    assert AutoTokenizer.from_pretrained(model).padding_side == "right"


def test_non_finite_loss_names_the_step(sft: SftRun, base: str, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match=r"in step 1, before the optimizer step, among rows \d+, \d+.* of train\."):
        fit_again(sft, str(tmp_path / "broken"), tmp_path / "out", Curve(), micro_batch_size=8, workers=WorkersConfig(cpus=0.5))
