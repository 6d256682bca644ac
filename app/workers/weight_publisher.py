"""The learner's policy weights into the rollout engines, and the check that they arrived.

Two ways: the object store (`app.workers.object_store_transfer`; what is not trained travels once), and from GPU to GPU, over NCCL or
within one by CUDA IPC (`app.workers.gpu_transfer`; the whole policy each time, adapters merged). Either way the push ends with a check:
both sides compute the log-probs of canary sequences, and they must agree.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from app.config.rollout import Transfer
from app.errors import NonFiniteError, WeightPushError
from app.experience import FloatArray, IntArray, Rollout

if TYPE_CHECKING:
    from app.workers.learner_group import RayLearner
    from app.workers.rollout_pool import VllmRolloutPool

CANARIES = 2


def canaries_of(rollouts: Sequence[Rollout]) -> list[IntArray]:
    """Sequences to compare engine and learner on, int32 [S] each: the first rollouts, without their last token.

    An engine that judges a sequence draws one more token behind it, and a rollout may fill the engine's context."""
    return [rollout.sequence[:-1] for rollout in rollouts[:CANARIES]]


def canary_mismatch(engine: Sequence[FloatArray], learner: Sequence[FloatArray]) -> float:
    """max |log p(engine) - log p(learner)| over all tokens of the canaries, in nats; NaN where one is."""
    return float(np.max([np.abs(a - b).max() for a, b in zip(engine, learner, strict=True)]))  # Python's max would lose a NaN


class WeightPublisher:
    """`Publisher`: pushes the weights, then compares canary log-probs on every engine."""

    def __init__(
        self,
        learner: RayLearner,
        pool: VllmRolloutPool,
        canaries: Sequence[IntArray],
        *,
        limit: float,
        transfer: Transfer = "object_store",
        tensor_parallel: int = 1,
    ) -> None:
        """tensor_parallel: GPUs per engine."""
        self._learner = learner
        self._pool = pool
        self._canaries = list(canaries)
        self._limit = limit
        self._through_store = transfer == "object_store"
        if not self._through_store:
            pool.refuse_replacements()  # from now on: weights are sent to these
            learner.connect_engines(pool.engines, transfer, tensor_parallel=tensor_parallel)

    def publish(self, version: int) -> dict[str, float]:
        began, metrics = time.perf_counter(), dict[str, float]()
        if self._through_store:
            policy = self._learner.pushed_policy()
            self._pool.load(policy, version)
            metrics = {"push/bytes": float(policy.bytes), "push/share": policy.share}
        else:
            self._learner.send_policy(version)
        pushed = time.perf_counter()
        metrics |= {"push/canary_mismatch": self._verify(version)}
        return metrics | {"push/seconds": pushed - began, "push/verify_seconds": time.perf_counter() - pushed}

    def _verify(self, version: int) -> float:
        expected = self._learner.logprobs(self._canaries)
        if not all(np.isfinite(logprobs).all() for logprobs in expected):
            raise NonFiniteError(
                f"policy version {version} gives log-probs that are NaN or infinite on the canaries: its weights have diverged; "
                "lower ppo.policy.lr"
            )
        mismatch = float(np.max([canary_mismatch(answer, expected) for answer in self._pool.each("logprobs", self._canaries)]))
        if not mismatch <= self._limit:
            raise WeightPushError(
                f"after the push of policy version {version} the rollout engine's log-probs differ from the learner's by "
                f"{mismatch:.2e} nats on the canaries (limit ppo.max_logprob_mismatch = {self._limit:.0e}): the engine does not hold "
                "the learner's weights, or computes in another precision; in bf16 a limit near 0.1 is usual"
            )
        return mismatch
