"""The PPO loop: sample, score, credit, learn, publish. Written against the Protocols of `app.interfaces`; knows no Ray.

Shape legend: B rollouts, T response tokens (see app.experience).
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from app.algorithms.credit import credit_metrics
from app.algorithms.shaping import scale_of
from app.config.ppo import PpoConfig
from app.data.prompt_stream import PromptStream
from app.errors import CheckpointError, Interrupted, RolloutError, ScoringError, StaleRolloutError
from app.experience import Experience, FinishReason, FloatArray, Rollout, TokenBatch, pad_rows
from app.interfaces import Learner, Pending, Publisher, Reward, RolloutPool, Scorer, Tracker
from app.numerics import Moments
from app.stages.reference_scores import reference_scores, shape_rollout_scores


@dataclass(frozen=True)
class LoopState:
    """Where the loop stands: finished steps, version of the policy weights, prompts already trained on, weight of the KL penalty
    (None: ppo.kl.coef, nothing has changed it yet), moments of the scores that ppo.reward.scale divides by."""

    step: int = 0
    version: int = 0
    prompt_cursor: int = 0
    kl_coef: float | None = None
    scores: Moments = Moments()

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> LoopState:
        """The state whose `asdict` a checkpoint holds. Raises CheckpointError unless it has exactly these parts."""
        names = {field.name for field in fields(cls)}
        if saved.keys() != names:
            raise CheckpointError(
                f"the checkpoint's loop state holds {sorted(saved)}, this version reads {sorted(names)}: "
                "go on with the version that wrote it, or start in another run.dir"
            )
        return cls(**{**saved, "scores": Moments(**saved["scores"])})


class Checkpoints(Protocol):
    """Where loop states are kept."""

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> object: ...


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
    max_new_tokens: int


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
    LearnerError, DeadlineError, and Interrupted after saving a checkpoint when `stop_requested()` turns true.
    """
    algorithm = config.make_algorithm()
    parts.publisher.publish(state.version)
    stream = RolloutStream(parts, config, state, seed=seed)
    while state.step < config.steps:
        clock = PhaseClock()
        began = time.perf_counter()
        # 1. what was sampled
        with clock("rollout"):
            rollouts = stream.take()
        check_lag(rollouts, state.version, config.max_lag)
        # 2. what the models think of it: reward model, reference, policy and critic work at the same time
        with clock("score"):
            sequences = [rollout.sequence for rollout in rollouts]
            scores, reference = parts.reward.score(rollouts), parts.scorer.logprobs(sequences)
            baselines = reference_scores(parts.reward, rollouts) if config.reward.delta else None
            tokens = TokenBatch.from_rollouts(rollouts, parts.pad_id)
            proximal_BT, values_BT = parts.learner.inspect(tokens)
            scores_B = torch.tensor(scores.result(), dtype=torch.float32)
            shaped_B, moments = shape_rollout_scores(scores_B, baselines, rollouts, state.scores, config.reward, parts.max_new_tokens)
            experience = collect_experience(rollouts, tokens, shaped_B, reference.result(), proximal_BT, values_BT)
        require_agreement(experience, config)
        require_scores(shaped_B, config)
        # 3. credit: KL-shaped rewards, advantages, returns
        kl_coef = config.kl.coef if state.kl_coef is None else state.kl_coef
        experience = algorithm.credit(experience, kl_coef=kl_coef)
        credited = credit_metrics(experience)
        # 4. learn: epochs x minibatches x micro-batches happen inside the workers
        with clock("update"):
            update = parts.learner.update(experience, seed=seed + state.step)
        # 5. publish and record
        state = LoopState(
            step=state.step + 1,
            version=state.version + 1,
            prompt_cursor=state.prompt_cursor + stream.prompts_per_step,
            kl_coef=config.kl.after(kl_coef, kl=credited["kl"], sequences=int(experience.mask_BT.any(1).sum())),
            scores=moments,
        )
        with clock("push"):
            push = parts.publisher.publish(state.version)
        seconds = time.perf_counter() - began
        metrics = step_metrics(rollouts, scores_B, seconds) | credited | dict(update) | dict(push)
        metrics["score_scale"] = scale_of(config.reward, moments)
        parts.tracker.log("ppo", state.step, metrics | {f"seconds/{phase}": spent for phase, spent in clock.seconds.items()})
        stopping = stop_requested()
        if stopping or state.step % config.save_every == 0 or state.step == config.steps:
            parts.checkpoints.save(state.step, asdict(state), lambda folder: parts.learner.save(str(folder)))
        if stopping:
            raise Interrupted(
                f"stopped after PPO step {state.step} of {config.steps}; a checkpoint is saved, the same command goes on from it"
            )
    return state


class RolloutStream:
    """Batches of rollouts, `max_lag` of them sampled ahead of the learner."""

    def __init__(self, parts: Parts, config: PpoConfig, state: LoopState, *, seed: int) -> None:
        self._parts, self._config, self._seed = parts, config, seed
        self.prompts_per_step = config.batch_size // config.samples_per_prompt
        self._cursor = state.prompt_cursor
        self._remaining = config.steps - state.step
        self._in_flight: deque[Pending[list[Rollout]]] = deque()

    def take(self) -> list[Rollout]:
        """The next batch; before returning it, start those that may be sampled while the learner works on it."""
        self._fill(1)
        batch = self._in_flight.popleft().result()
        self._fill(self._config.max_lag)
        return batch

    def _fill(self, count: int) -> None:
        while len(self._in_flight) < count and self._remaining:
            prompts = self._parts.prompts.take(self._cursor, self.prompts_per_step, seed=self._seed)
            batch = [prompt for prompt in prompts for _ in range(self._config.samples_per_prompt)]
            self._in_flight.append(self._parts.pool.submit(batch, seed=self._seed + self._cursor))
            self._cursor += self.prompts_per_step
            self._remaining -= 1


def check_lag(rollouts: Sequence[Rollout], version: int, max_lag: int) -> None:
    """Raises StaleRolloutError when a rollout is older than the run allows."""
    oldest = min(rollout.policy_version for rollout in rollouts)
    if version - oldest > max_lag:
        raise StaleRolloutError(
            f"a rollout was sampled by policy version {oldest}, the learner is at {version}: more than ppo.max_lag = {max_lag}"
        )


def collect_experience(
    rollouts: Sequence[Rollout],
    tokens: TokenBatch,
    scores_B: torch.Tensor,
    reference_logprobs: Sequence[FloatArray],
    proximal_BT: torch.Tensor,
    values_BT: torch.Tensor | None,
) -> Experience:
    """Align everything on response tokens. scores_B are the shaped ones; rollouts of one prompt are one group."""
    length = tokens.mask_BT.shape[1]
    reference = [rollout.of_response(row) for rollout, row in zip(rollouts, reference_logprobs, strict=True)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(rollout.prompt.id for rollout in rollouts))}
    return Experience(
        tokens=tokens,
        scores_B=scores_B,
        behaviour_BT=pad_rows([rollout.logprobs for rollout in rollouts], length),
        proximal_BT=proximal_BT,
        reference_BT=pad_rows(reference, length),
        values_BT=values_BT,
        groups_B=torch.tensor([numbers[rollout.prompt.id] for rollout in rollouts]),
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


def require_scores(scores_B: torch.Tensor, config: PpoConfig) -> None:
    """A failed score (NaN) is masked out of the update; more than a few of them are no accident. Raises ScoringError."""
    failed = int(scores_B.isnan().sum())
    if failed > config.max_failed_scores * len(scores_B):
        raise ScoringError(
            f"{failed} of {len(scores_B)} scores failed, more than ppo.max_failed_scores = {config.max_failed_scores:g} allows: "
            "look at the scoring service's logs"
        )


def step_metrics(rollouts: Sequence[Rollout], scores_B: torch.Tensor, seconds: float) -> dict[str, float]:
    """What one batch says about the policy, and how fast it came."""
    response_tokens = sum(len(rollout.ids) for rollout in rollouts)
    scored_B = scores_B[~scores_B.isnan()]
    return {
        "score_mean": float(scored_B.mean()),
        "score_std": float(scored_B.std(unbiased=False)),
        "finished_share": sum(rollout.finish is FinishReason.STOP for rollout in rollouts) / len(rollouts),
        "tokens_per_second": response_tokens / seconds,
        "seconds": seconds,
    }
