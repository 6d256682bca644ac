"""A step of PPO once more, from its recorded rollouts: does its credit lead to what the run has logged?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from app.config.ppo import PpoConfig
from app.curves import read_curves
from app.errors import ConfigError, ReplayError
from app.kept_rollouts import Batch, read_step
from app.run_layout import METRICS_FILE, ROLLOUTS
from app.stages.step_metrics import batch_metrics

RELATIVE, ABSOLUTE = 1e-5, 1e-6
"""Largest difference that counts as equal: sums over a batch may be added up in another order."""
SAME_FORWARD = 1e-4
"""Largest `first_step_mismatch` at which the update's losses are those of the recorded log-probs: float32 stays far below it."""


@dataclass(frozen=True)
class Comparison:
    """One metric: as logged (None where it was not finite, or is not in the log) and as computed again."""

    metric: str
    logged: float | None
    replayed: float

    @property
    def equal(self) -> bool:
        if self.logged is None or not math.isfinite(self.replayed):
            return self.logged is None and not math.isfinite(self.replayed)
        return math.isclose(self.logged, self.replayed, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def replay(run_path: Path, step: int) -> list[Comparison]:
    """Compute credit and losses of a step of the run in `run_path` again and compare every metric of them with metrics.jsonl.

    Log-probs, values and scores are taken as recorded. The losses are those before the first optimizer step, and where the step had
    no other, also the update's own, unless its forward pass has rounded otherwise than the one that is recorded (bf16). Raises
    ConfigError where rollouts or log lack the step, CheckpointError for a damaged file.
    """
    batch, config = read_step(run_path / "ppo" / ROLLOUTS, step)
    curves = read_curves(run_path / METRICS_FILE).get("ppo", {})
    logged = {name: curve.points[step] for name, curve in curves.items() if step in curve.points}
    if not logged:
        raise ConfigError(f"{run_path / METRICS_FILE}: no line of PPO step {step}; the run ended before it had logged it")
    same_forward = (logged.get("first_step_mismatch") or 0.0) <= SAME_FORWARD
    return [Comparison(name, logged.get(name), value) for name, value in recomputed(batch, config, same_forward=same_forward).items()]


def recomputed(batch: Batch, config: PpoConfig, *, same_forward: bool = True) -> dict[str, float]:
    """The metrics of a recorded step, from its rollouts alone. same_forward: whether the update started from the recorded log-probs."""
    algorithm = config.make_algorithm()
    credited = algorithm.credit(batch.experience, **batch.credit)
    metrics = batch_metrics(algorithm, batch.rollouts, batch.scores, credited, version=batch.version)
    if same_forward and config.epochs * config.minibatches == 1:
        metrics |= {name: metrics[f"start/{name}"] for name in ("policy_loss", "value_loss") if f"start/{name}" in metrics}
    return metrics


def require_equal(comparisons: list[Comparison], step: int) -> None:
    """Raises ReplayError that names the metrics that differ."""
    different = [row for row in comparisons if not row.equal]
    if different:
        first = different[0]
        others = f" (and {', '.join(row.metric for row in different[1:])})" if different[1:] else ""
        raise ReplayError(
            f"step {step}: {first.metric} was logged as {first.logged} and is now computed as {first.replayed}{others}: "
            "the code, the rollouts or the log have changed since"
        )
