"""Steps recorded by the loop, computed again: equal to the log, or the metric is named."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from app.alarms import AlarmWatch
from app.config.ppo import PpoConfig
from app.data.prompt_stream import PromptStream
from app.display import PlainDisplay
from app.errors import DiskError
from app.experience import Experience, FinishReason, Minibatch, PolicyOutputs, Prompt, Rollout, TokenBatch, Totals
from app.kept_rollouts import FACTS, RolloutRecorder, kept_steps, read_step, step_path
from app.rewards.length import LengthReward
from app.rewards.mix import Part, RewardMix, RuleSource
from app.rewards.reward_model import RewardModelReward
from app.stages.actor_learner import LoopState, Parts, actor_learner_loop
from app.stages.replay import replay
from app.tracking import RunTracker
from jobs.main import main
from tests.unit.stages.pending import Done, Sampled

CONFIG = PpoConfig(steps=5, batch_size=6, epochs=1, micro_batch_size=6, score_pieces=1, max_lag=1, keep_rollouts=3, max_failed_scores=0.5)


class Varied:
    """Engine, learner, publisher, scorer and checkpoints whose numbers differ from token to token."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.version = 0

    def submit(self, prompts: Sequence[Prompt], *, seed: int) -> Sampled:
        def rollout(i: int, prompt: Prompt) -> Rollout:
            ids = self.rng.integers(1, 5, size=2 + i).astype(np.int32)
            finish = FinishReason.LENGTH if i == 5 else FinishReason.STOP
            return Rollout(prompt, i, ids, self.floats(len(ids)) - 1, finish, np.full(len(ids), self.version))

        return Sampled([rollout(i, prompt) for i, prompt in enumerate(prompts)])

    def scores(self, sequences: Sequence[Any]) -> Done:
        return Done([float("nan") if i == 2 else float(score) for i, score in enumerate(self.floats(len(sequences)))])

    def logprobs(self, sequences: Sequence[Any]) -> Done:
        return Done([self.floats(len(sequence) - 1) - 1 for sequence in sequences])

    def inspect(self, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (torch.from_numpy(self.floats(tokens.mask_BT.numel())).reshape(tokens.mask_BT.shape) for _ in range(2))
        return torch.where(tokens.mask_BT, first - 1, 0.0), torch.where(tokens.mask_BT, second, 0.0)

    def update(self, experience: Experience, *, step: int) -> Mapping[str, float]:
        """The losses of a single optimizer step: one whole-batch pass over the weights that gave log-probs and values."""
        batch = Minibatch.from_rows(experience, torch.arange(len(experience.tokens)))
        outputs = PolicyOutputs(experience.proximal_BT, experience.values_BT, torch.ones_like(experience.values_BT))
        totals = Totals(int(experience.mask_BT.sum()), int(experience.mask_BT.any(1).sum()))
        return CONFIG.make_algorithm().loss(outputs, batch, totals).metrics

    def publish(self, version: int) -> Mapping[str, float]:
        self.version = version
        return {"push/canary_mismatch": 0.0}

    def save(self, step: int, state: Mapping[str, int], write: Callable[[Path], None]) -> None:
        """Keep nothing."""

    def settle(self, *, wait_for_it: bool) -> None:
        """There is nothing under way."""

    def floats(self, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (0.1 * self.rng.normal(size=count)).astype(np.float32)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the last three of five steps."""
    world: Any = Varied()
    reward = RewardMix(
        (
            Part("models", (RewardModelReward(world), RewardModelReward(world))),
            Part("short", (RuleSource(LengthReward(type="length", maximum=3), decode=str),), weight=0.5),
            Part("judge", (RewardModelReward(world),), hold_out=True),
        )
    )
    prompts = PromptStream.over([Prompt(str(i), f"prompt {i}", np.array([i, 1], np.int32)) for i in range(6)])
    recorder = RolloutRecorder(tmp_path / "ppo" / "rollouts", CONFIG, decode=lambda ids: " ".join(map(str, ids)), pad_id=0)
    with RunTracker(tmp_path, display=PlainDisplay(io.StringIO())) as tracker:
        parts = Parts(world, world, world, reward, world, tracker, world, prompts, 0, 10, AlarmWatch(), recorder)
        actor_learner_loop(parts, CONFIG, LoopState(), seed=0)
    return tmp_path


def test_the_newest_steps_are_kept_and_replay_to_what_was_logged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kept_steps(run / "ppo" / "rollouts") == [3, 4, 5]
    for step in (3, 4, 5):
        comparisons = {row.metric: row for row in replay(run, step)}
        assert [row for row in comparisons.values() if not row.equal] == []
        needed = {
            "reward",
            "kl",
            "explained_variance",
            "start/policy_loss",
            "start/value_loss",
            "reward/short",
            "holdout_score",
            "staleness",
        }
        assert needed | {"reward_disagreement", "masked_rows", "failed_scores", "repetition_share"} <= comparisons.keys()
        assert comparisons["failed_scores"].replayed == pytest.approx(1 / 6)
        assert comparisons["start/value_loss"].replayed > 0
        assert {"policy_loss", "value_loss"} <= comparisons.keys()  # the only optimizer step's own
    assert main(["replay", str(run), "4"]) == 0
    assert "explained_variance" in capsys.readouterr().out


def test_losses_of_a_forward_pass_that_rounds_otherwise_are_not_compared(run: Path) -> None:
    """In bf16 the update's pass over a batch differs from the one whose log-probs are recorded, and so do its losses."""
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        line["metrics"]["policy_loss"] += 1e-3
        line["metrics"]["first_step_mismatch"] = 0.02 if line["step"] == 4 else 1e-6
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared = {row.metric: row for row in replay(run, 4)}
    assert all(row.equal for row in compared.values()) and "start/policy_loss" in compared and "policy_loss" not in compared
    assert [row.metric for row in replay(run, 5) if not row.equal] == ["policy_loss"]


def test_the_file_holds_the_rollouts_for_other_tools(run: Path) -> None:
    table = pq.read_table(step_path(run / "ppo" / "rollouts", 5))
    (row,) = table.slice(1, 1).to_pylist()
    assert row["response"] == " ".join(map(str, row["ids"]))
    assert row["prompt"].startswith("prompt ") and row["finish"] == "stop" and row["trained"]
    per_token = ("behaviour", "proximal", "reference", "values", "rewards", "advantages", "returns")
    assert {len(row[name]) for name in per_token} == {len(row["ids"])}
    failed = table["trained"].to_pylist().index(False)
    assert np.isnan(table["score"][failed].as_py()) and np.isnan(table["score/models"][failed].as_py())
    batch, config = read_step(run / "ppo" / "rollouts", 5)
    assert (batch.step, batch.version, batch.credit, config) == (5, 4, {"kl_coef": CONFIG.kl.coef}, CONFIG)


def test_a_difference_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = step_path(run / "ppo" / "rollouts", 3)
    table = pq.read_table(path)
    values = table["values"].to_pylist()
    values[0][0] += 0.01
    column = pa.array(values, pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.schema.get_field_index("values"), "values", column), path)
    assert main(["replay", str(run), "3", "--json"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert not result["equal"]
    different = {row["metric"] for row in result["metrics"] if not row["equal"]}
    assert {"value_mean", "explained_variance", "start/value_loss"} <= different
    assert "score_mean" not in different and "kl" not in different
    assert "corral: error: step 3: " in captured.err and "value_mean" in captured.err


@pytest.mark.parametrize(
    ("step", "code", "message"), [("1", 2, "no rollouts of step 1 there (it has steps 3 to 5"), ("4", 2, "no rollouts of ours, or damaged")]
)
def test_what_is_not_there_is_told(run: Path, step: str, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    step_path(run / "ppo" / "rollouts", 4).write_text("no parquet")
    assert main(["replay", str(run), step]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("spoil", ["no column", "no rows", "other type", "unknown finish", "metadata", "no padding", "newer key"])
def test_a_file_that_parquet_reads_and_we_do_not_is_told_too(run: Path, spoil: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = step_path(run / "ppo" / "rollouts", 4)
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[FACTS])

    def with_column(name: str, column: Sequence[Any]) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, pa.array(column))

    def with_facts(text: str) -> pa.Table:
        return table.replace_schema_metadata({FACTS: text})

    spoilt = {
        "no column": lambda: table.drop_columns(["score"]),
        "no rows": lambda: table.slice(0, 0),
        "other type": lambda: with_column("ids", ["text"] * len(table)),
        "unknown finish": lambda: with_column("finish", ["never"] * len(table)),
        "metadata": lambda: with_facts("{half"),
        "no padding": lambda: with_facts(json.dumps({key: value for key, value in facts.items() if key != "pad_id"})),
        "newer key": lambda: with_facts(json.dumps(facts | {"config": facts["config"] | {"of_tomorrow": 1}})),
    }
    pq.write_table(spoilt[spoil](), path)
    assert main(["replay", str(run), "4"]) == 2
    assert f"{path}: no rollouts of ours, or damaged (" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"garbage", b"[1, 2]", b'{"stage": "ppo", "step": 4}', b"\xff"])
def test_a_spoilt_line_of_the_log_is_named(run: Path, line: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + line + b"\n")
    assert main(["replay", str(run), "4"]) == 2
    assert f"{log}:6: no line of a run's metrics (" in capsys.readouterr().err


def test_a_resumed_run_drops_what_the_lost_steps_left(run: Path) -> None:
    folder = run / "ppo" / "rollouts"
    batch, config = read_step(folder, 4)
    RolloutRecorder(folder, config, decode=str, pad_id=0).write(batch, config.make_algorithm().credit(batch.experience, **batch.credit))
    assert kept_steps(folder) == [3, 4]


def test_a_full_disk_is_told_and_leaves_the_steps_before(run: Path) -> None:
    folder = run / "ppo" / "rollouts"
    batch, config = read_step(folder, 5)
    recorder = RolloutRecorder(folder, config, decode=str, pad_id=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DiskError, match=rf"^{folder}: the rollouts of step 6 cannot be written \(.*File too large.*keep_rollouts = 0$"):
            recorder.write(replace(batch, step=6), batch.experience)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in folder.iterdir()) == [step_path(folder, step).name for step in (3, 4, 5)]
    recorder.write(replace(batch, step=6), batch.experience)
    assert kept_steps(folder) == [4, 5, 6]


def test_a_batch_that_credit_refuses_is_there_to_be_looked_at(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "ppo" / "rollouts"
    batch, config = read_step(folder, 4)
    batch.experience.values_BT[0, 0] = torch.nan
    RolloutRecorder(folder, config, decode=str, pad_id=0).write(batch, batch.experience)
    assert pq.read_table(step_path(folder, 4))["advantages"].null_count == CONFIG.batch_size
    assert main(["replay", str(run), "4"]) == 1
    assert "values of rollouts [0] (of 6) are NaN" in capsys.readouterr().err
