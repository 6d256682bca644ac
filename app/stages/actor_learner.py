"""The PPO loop: sample, score, credit, learn, publish. Written against the Protocols of `app.interfaces`; knows no Ray.

Shape legend: B rollouts, T response tokens (see app.experience).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from app.alarms import AlarmWatch
from app.algorithms.algorithm import Algorithm
from app.algorithms.shaping import scale_of
from app.config.ppo import PpoConfig
from app.data.prompt_stream import PromptStream
from app.errors import CheckpointError, Interrupted
from app.experience import Experience, TokenBatch, pad_rows, prompt_groups
from app.interfaces import Learner, Publisher, Reward, RolloutPool, Scorer, Tracker
from app.kept_rollouts import Batch, RolloutRecorder
from app.numerics import Moments
from app.rewards.mix import failure_note
from app.stages.reference_scores import shape_rollout_scores
from app.stages.rollout_stream import RolloutStream, SampledBatch, ScoredRollouts
from app.stages.step_checks import check_lag, require_agreement, require_finite_batch, require_scores, sound_alarms
from app.stages.step_metrics import PhaseClock, batch_metrics, time_metrics


@dataclass(frozen=True)
class LoopState:
    """Where the loop stands: finished steps, version of the policy weights (steps in which they moved), prompts drawn up to the latest
    batch, positions of those among them that it has left to the next one, weight of the KL penalty (None: ppo.kl.coef, nothing has
    changed it yet), moments of the scores that ppo.reward.scale divides by."""

    step: int = 0
    version: int = 0
    prompt_cursor: int = 0
    carried: tuple[int, ...] = ()
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
        return cls(**{**saved, "carried": tuple(saved["carried"]), "scores": Moments(**saved["scores"])})

    def after(self, batch: SampledBatch, *, moved: bool, kl_coef: float, scores: Moments) -> LoopState:
        """Of the step that learned from `batch`. moved: whether the policy did."""
        return LoopState(
            step=self.step + 1,
            version=self.version + int(moved),
            prompt_cursor=batch.cursor,
            carried=tuple(batch.carried),
            kl_coef=kl_coef,
            scores=scores,
        )


class Checkpoints(Protocol):
    """Where loop states are kept."""

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> object:
        """Keep the state and what `write` writes into a folder. It has been written when this returns; it may be kept for good later."""
        ...

    def settle(self, *, wait_for_it: bool) -> None:
        """Raise why the latest checkpoint cannot be kept, if that is known, or after waiting until it is known."""
        ...


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
    watch: AlarmWatch = field(default_factory=AlarmWatch)
    recorder: RolloutRecorder | None = None


def actor_learner_loop(
    parts: Parts, config: PpoConfig, state: LoopState, *, seed: int, stop_requested: Callable[[], bool] = lambda: False
) -> LoopState:
    """Run the loop from `state` to `config.steps` and return where it ended.

    Raises StaleRolloutError, RolloutError (engine and learner disagree), WeightPushError, ScoringError, NonFiniteError,
    AlarmError (after the step is recorded), LearnerError, DeadlineError, and Interrupted after saving a checkpoint when
    `stop_requested()` turns true.
    """
    algorithm = config.make_algorithm()
    parts.publisher.publish(state.version)
    with RolloutStream(
        parts.pool, parts.reward, parts.scorer, parts.prompts, config, seed=seed, step=state.step, cursor=state.prompt_cursor,
        carried=state.carried,
    ) as stream:  # fmt: skip
        stream.fill(state.step)
        clock = PhaseClock()
        while state.step < config.steps:
            # 1. what was sampled; reward model and reference judge each piece of it while the rest is still sampled
            with clock("rollout"):
                batch, judged = stream.take()
            rollouts = batch.rollouts
            check_lag(rollouts, state.version, config.max_lag)
            # 2. what the models think of it: reward model, reference, policy and critic work at the same time
            with clock("score"):
                tokens = TokenBatch.from_rollouts(rollouts, parts.pad_id)
                proximal_BT, values_BT = parts.learner.inspect(tokens)
                scored = judged.result()
                scores_B = torch.from_numpy(scored.scores.total_B).float()
                shaped_B, moments = shape_rollout_scores(
                    scores_B, scored.baselines, rollouts, state.scores, config.reward, parts.max_new_tokens
                )
                experience = collect_experience(scored, tokens, shaped_B, proximal_BT, values_BT)
            require_agreement(experience, config)
            note = failure_note(scored.scores, scored.baselines.scores if scored.baselines else None)
            require_scores(note, shaped_B, config)
            if note:
                parts.tracker.event("ppo", state.step + 1, note)
            # 3. credit: KL-shaped rewards, advantages, returns
            kl_coef = config.kl.coef if state.kl_coef is None else state.kl_coef
            kept = Batch(state.step + 1, state.version, rollouts, scored.scores, experience, {"kl_coef": kl_coef})
            experience = credit_and_record(parts, algorithm, kept)
            measured = batch_metrics(algorithm, rollouts, scored.scores, experience, version=state.version)
            require_finite_batch(parts.tracker, kept.step, measured)
            if config.carry_over:
                measured |= batch.metrics(state.version)
            # 4. learn: epochs x minibatches x micro-batches happen inside the workers
            with clock("update"):
                update = parts.learner.update(experience, step=state.step)
            # 5. publish and record
            moved = config.policy_learns(state.step)
            if moved:
                kl_coef = config.kl.after(kl_coef, kl=measured["kl"], sequences=int(experience.mask_BT.any(1).sum()))
            state = state.after(batch, moved=moved, kl_coef=kl_coef, scores=moments)
            with clock("push"):
                push = parts.publisher.publish(state.version)
                stream.fill(state.step)
            metrics = measured | dict(update) | dict(push) | time_metrics(rollouts, clock)
            metrics["score_scale"] = scale_of(config.reward, moments)
            if config.critic_warmup_steps:
                metrics["critic_warmup"] = float(not moved)
            metrics |= parts.watch.drift(metrics)
            parts.tracker.log("ppo", state.step, metrics)
            clock = PhaseClock()  # what a checkpoint holds up belongs to the step after it
            sound_alarms(parts.tracker, parts.watch, state.step, metrics)
            # 6. keep: the parts are written now, and become a checkpoint beside the next step
            stopping = stop_requested()
            ending = stopping or state.step == config.steps
            with clock("checkpoint"):
                if ending or state.step % config.save_every == 0:
                    parts.checkpoints.save(state.step, asdict(state), lambda folder: parts.learner.save(str(folder)))
                parts.checkpoints.settle(wait_for_it=ending)
            if stopping:
                raise Interrupted(
                    f"stopped after PPO step {state.step} of {config.steps}; a checkpoint is saved, the same command goes on from it"
                )
    return state


def collect_experience(
    scored: ScoredRollouts,
    tokens: TokenBatch,
    scores_B: torch.Tensor,
    proximal_BT: torch.Tensor,
    values_BT: torch.Tensor | None,
) -> Experience:
    """Align everything on response tokens. scores_B are the shaped ones; rollouts of one prompt are one group."""
    length = tokens.mask_BT.shape[1]
    rollouts = scored.rollouts
    reference = [rollout.of_response(row) for rollout, row in zip(rollouts, scored.reference, strict=True)]
    return Experience(
        tokens=tokens,
        scores_B=scores_B,
        behaviour_BT=pad_rows([rollout.logprobs for rollout in rollouts], length),
        proximal_BT=proximal_BT,
        reference_BT=pad_rows(reference, length),
        values_BT=values_BT,
        groups_B=prompt_groups(rollouts),
    )


def credit_and_record(parts: Parts, algorithm: Algorithm[Any], batch: Batch) -> Experience:
    """The credited experience; the batch is recorded, also one that credit refuses. Raises NonFiniteError."""
    credited = batch.experience
    try:
        credited = algorithm.credit(batch.experience, **batch.credit)
    finally:
        if parts.recorder is not None:
            parts.recorder.write(batch, credited)
    return credited
