"""The PPO loop: sample, score, credit, learn, publish. Written against the Protocols of `app.interfaces`; knows no Ray.

Shape legend: B rollouts, T response tokens (see app.experience).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from app.alarms import AlarmWatch, require_finite
from app.algorithms import ALGORITHMS
from app.algorithms.ppo import Ppo
from app.config.ppo import PpoConfig
from app.data.prompt_stream import PromptStream
from app.errors import Interrupted, NonFiniteError, RolloutError, ScoringError, StaleRolloutError
from app.experience import Experience, FinishReason, Rollout, Scores, TokenBatch, pad_rows
from app.interfaces import Learner, Publisher, Reward, RolloutPool, Scorer, Tracker
from app.kept_rollouts import Batch, RolloutRecorder
from app.numerics import shape_scores
from app.stages.rollout_stream import RolloutStream, ScoredRollouts
from app.stages.step_metrics import batch_metrics, speed_metrics


@dataclass(frozen=True)
class LoopState:
    """Where the loop stands: finished steps, version of the policy weights, prompts already trained on."""

    step: int = 0
    version: int = 0
    prompt_cursor: int = 0


class Checkpoints(Protocol):
    """Where loop states are kept."""

    def save(self, step: int, state: Mapping[str, int], write: Callable[[Path], None]) -> object: ...


@dataclass(frozen=True)
class Parts:
    """What the loop drives."""

    learner: Learner
    pool: RolloutPool
    publisher: Publisher
    reward: Reward
    scorer: Scorer
    tracker: Tracker
    checkpoints: Checkpoints
    prompts: PromptStream
    pad_id: int
    watch: AlarmWatch = field(default_factory=AlarmWatch)
    recorder: RolloutRecorder | None = None


class PhaseClock:
    """Seconds spent in each named phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began


def actor_learner_loop(
    parts: Parts, config: PpoConfig, state: LoopState, *, seed: int, stop_requested: Callable[[], bool] = lambda: False
) -> LoopState:
    """Run the loop from `state` to `config.steps` and return where it ended.

    Raises StaleRolloutError, RolloutError (engine and learner disagree), WeightPushError, ScoringError, NonFiniteError,
    AlarmError (after the step is recorded), DeadlineError, and Interrupted after saving a checkpoint when `stop_requested()` turns true.
    """
    algorithm = ALGORITHMS["ppo"](config.algorithm)
    parts.publisher.publish(state.version)
    stream = RolloutStream(
        parts.pool, parts.reward, parts.scorer, parts.prompts, batch_size=config.batch_size, pieces=config.score_pieces,
        max_lag=config.max_lag, seed=seed, step=state.step, steps=config.steps, cursor=state.prompt_cursor,
    )  # fmt: skip
    stream.fill(state.step)
    while state.step < config.steps:
        clock = PhaseClock()
        began = time.perf_counter()
        # 1. what was sampled; reward model and reference judge each piece of it while the rest is still sampled
        with clock("rollout"):
            pending = stream.take()
        rollouts = pending.rollouts
        check_lag(rollouts, state.version, config.max_lag)
        # 2. what the models think of it: reward model, reference, policy and critic work at the same time
        with clock("score"):
            tokens = TokenBatch.from_rollouts(rollouts, parts.pad_id)
            proximal_BT, values_BT = parts.learner.inspect(tokens)
            scored = pending.result()
            scores_B = torch.from_numpy(scored.scores.total_B).float()
            experience = collect_experience(scored, tokens, scores_B, proximal_BT, values_BT, config)
        require_agreement(experience, config)
        require_scores(scored.scores, config)
        # 3. credit: KL-shaped rewards, advantages, returns
        batch = Batch(state.step + 1, state.version, rollouts, scored.scores, experience, {"kl_coef": config.kl.coef})
        experience = credit_and_record(parts, algorithm, batch)
        measured = batch_metrics(algorithm, rollouts, scored.scores, experience, version=state.version, max_lag=config.max_lag)
        require_finite_batch(parts, batch.step, measured)
        # 4. learn: epochs x minibatches x micro-batches happen inside the workers
        with clock("update"):
            update = parts.learner.update(experience, seed=seed + state.step)
        # 5. publish and record
        state = LoopState(state.step + 1, state.version + 1, state.prompt_cursor + len(rollouts))
        with clock("push"):
            push = parts.publisher.publish(state.version)
            stream.fill(state.step)
        metrics = measured | dict(update) | dict(push) | speed_metrics(rollouts, time.perf_counter() - began)
        metrics |= {f"seconds/{phase}": spent for phase, spent in clock.seconds.items()} | parts.watch.drift(metrics)
        parts.tracker.log("ppo", state.step, metrics)
        sound_alarms(parts, state.step, metrics)
        stopping = stop_requested()
        if stopping or state.step % config.save_every == 0 or state.step == config.steps:
            parts.checkpoints.save(state.step, asdict(state), lambda folder: parts.learner.save(str(folder)))
        if stopping:
            raise Interrupted(
                f"stopped after PPO step {state.step} of {config.steps}; a checkpoint is saved, the same command goes on from it"
            )
    return state


def check_lag(rollouts: Sequence[Rollout], version: int, max_lag: int) -> None:
    """Raises StaleRolloutError when a rollout is older than the run allows."""
    oldest = min(rollout.policy_version for rollout in rollouts)
    if version - oldest > max_lag:
        raise StaleRolloutError(
            f"a rollout was sampled by policy version {oldest}, the learner is at {version}: more than ppo.max_lag = {max_lag}"
        )


def collect_experience(
    scored: ScoredRollouts,
    tokens: TokenBatch,
    scores_B: torch.Tensor,
    proximal_BT: torch.Tensor,
    values_BT: torch.Tensor,
    config: PpoConfig,
) -> Experience:
    """Align everything on response tokens; scores are shaped (clip, missing end token) here."""
    length = tokens.mask_BT.shape[1]
    rollouts = scored.rollouts
    finished_B = torch.tensor([rollout.finish is FinishReason.STOP for rollout in rollouts])
    reference = [rollout.of_response(row) for rollout, row in zip(rollouts, scored.reference, strict=True)]
    return Experience(
        tokens=tokens,
        scores_B=shape_scores(scores_B, finished_B, clip=config.reward.clip, missing_eos_score=config.reward.missing_eos_score),
        behaviour_BT=pad_rows([rollout.logprobs for rollout in rollouts], length),
        proximal_BT=proximal_BT,
        reference_BT=pad_rows(reference, length),
        values_BT=values_BT,
    )


def require_agreement(experience: Experience, config: PpoConfig) -> None:
    """At lag 0 engine and learner hold the same weights, so their log-probs must agree on every sampled token."""
    if config.max_lag:
        return
    mismatch = float((experience.proximal_BT - experience.behaviour_BT).abs().max())
    if not mismatch <= config.max_logprob_mismatch:
        raise RolloutError(
            f"the rollout engine's log-probs differ from the learner's by {mismatch:.2e} nats on sampled tokens (limit "
            f"ppo.max_logprob_mismatch = {config.max_logprob_mismatch:.0e}): temperature, precision or weights differ between the two"
        )


def require_scores(scores: Scores, config: PpoConfig) -> None:
    """A failed score (NaN) is masked out of the update; more than a few of them are no accident. Raises ScoringError."""
    failed, count = int(np.isnan(scores.total_B).sum()), len(scores.total_B)
    if failed > config.max_failed_scores * count:
        reasons = "; ".join(f"{part}: {reason}" for part, reason in scores.failures.items() if part not in scores.held_out)
        raise ScoringError(
            f"{failed} of {count} scores failed, more than ppo.max_failed_scores = {config.max_failed_scores:g} allows ({reasons}): "
            "mend that, or look at the logs in the run folder"
        )


def credit_and_record(parts: Parts, algorithm: Ppo, batch: Batch) -> Experience:
    """The credited experience; the batch is recorded, also one that credit refuses. Raises NonFiniteError."""
    credited = batch.experience
    try:
        credited = algorithm.credit(batch.experience, **batch.credit)
    finally:
        if parts.recorder is not None:
            parts.recorder.write(batch, credited)
    return credited


def require_finite_batch(parts: Parts, step: int, metrics: Mapping[str, float]) -> None:
    """Raises NonFiniteError before the update, with the metrics logged."""
    try:
        require_finite(metrics)
    except NonFiniteError:
        parts.tracker.log("ppo", step, metrics)
        raise


def sound_alarms(parts: Parts, step: int, metrics: Mapping[str, float]) -> None:
    """Tell the alarms that begin with this step. Raises NonFiniteError, and AlarmError for the first alarm that is set to stop the run."""
    # An infinite gradient norm is how mixed precision tells that it skipped the step.
    require_finite({name: value for name, value in metrics.items() if not name.endswith("grad_norm")})
    begun = parts.watch.look(metrics)
    for alarm in begun:
        parts.tracker.event("ppo", step, alarm.text)
    for alarm in begun:
        if alarm.action == "stop":
            raise alarm.error()
