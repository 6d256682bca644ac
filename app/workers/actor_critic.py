"""Policy and, where the algorithm has one, critic on one rank of the learner: their passes over a batch and their optimizer steps.

Shape legend: B rollouts, T response tokens, S sequence (see app.experience).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from app.config.ppo import PpoConfig
from app.data.batch_order import PassLimit, RowShape, micro_batches
from app.errors import LearnerError, NonFiniteError
from app.experience import Experience, FloatArray, IntArray, Minibatch, PolicyOutputs, TokenBatch, Totals
from app.numerics import gather_response
from app.workers.engine_losses import engine_losses

if TYPE_CHECKING:
    from app.workers.pretraining import PretrainingMix


def minibatch_rows(total: int, minibatches: int, *, seed: int, epoch: int) -> list[torch.Tensor]:
    """Which rows belong to each optimizer step of an epoch: int64 index tensors, a fresh shuffle per epoch.

    Depends on seed and epoch only, so every rank computes the same assignment.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(total, generator=generator)
    return [order[k::minibatches] for k in range(minibatches)]


@dataclass
class OpenPasses:
    """Forward passes of `inspect` whose backward is still to come (see ppo.reuse_forward): row indices into `tokens`, outputs."""

    tokens: TokenBatch
    passes: deque[tuple[torch.Tensor, PolicyOutputs]] = field(default_factory=deque)


class ActorCritic:
    """Two DeepSpeed engines, or one that is both. Every rank takes part in every call."""

    def __init__(
        self,
        policy: Any,
        critic: Any,
        config: PpoConfig,
        limit: PassLimit,
        *,
        temperature: float,
        seed: int,
        rank: int,
        world: int,
        device: torch.device,
        pretraining: PretrainingMix | None = None,
    ) -> None:
        """critic: an engine of its own, or None; limit: on a forward pass; temperature: of sampling, by which logits are divided."""
        self._policy, self._critic, self._config, self._limit = policy, critic, config, limit
        self._temperature, self._seed = temperature, seed
        self._rank, self._world, self._device = rank, world, device
        self._pretraining = pretraining
        self._algorithm = config.make_algorithm()
        self._held: OpenPasses | None = None

    @property
    def engines(self) -> dict[str, Any]:
        """By name, which is also that of their section in the config."""
        return {name: engine for name, engine in (("policy", self._policy), ("critic", self._critic)) if engine is not None}

    def forget_passes(self) -> None:
        """Of those that `inspect` holds for an update: the weights are others now."""
        self._held = None

    def inspect(self, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(rows, log-probs, values) of this rank's share of the batch; the last two float32 [b, T], no values without a critic."""
        length = tokens.mask_BT.shape[1]
        reuse = self._config.reuse_forward
        self._held = OpenPasses(tokens)
        logprobs, values = [], []
        batches = self._micro_batches(torch.arange(len(tokens)), tokens)
        for rows in batches:
            with torch.set_grad_enabled(reuse):
                outputs = self._forward(tokens.rows(rows))
            if reuse:
                self._held.passes.append((rows, outputs))
            pad = (0, length - outputs.logprobs_BT.shape[1])
            logprobs.append(torch.nn.functional.pad(outputs.logprobs_BT.detach().cpu(), pad))
            if outputs.values_BT is not None:
                values.append(torch.nn.functional.pad(outputs.values_BT.detach().cpu(), pad))
        return torch.cat(batches), torch.cat(logprobs), torch.cat(values) if values else None

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        """Epochs x minibatches x micro-batches; metrics are means over the optimizer steps, the same on every rank. step: of the loop."""
        config = self._config
        learns = config.policy_learns(step)
        if config.has_value_head and not learns:
            self._held = None  # those passes would carry gradients through the trunk
        history: dict[str, list[float]] = defaultdict(list)
        for epoch in range(config.epochs):
            minibatches = minibatch_rows(len(experience.tokens), config.minibatches, seed=self._seed + step, epoch=epoch)
            for number, rows in enumerate(minibatches):
                totals = Totals(tokens=int(experience.mask_BT[rows].sum()), sequences=int(experience.mask_BT[rows].any(1).sum()))
                if not totals.tokens:
                    continue  # every row of this minibatch failed to score: there is nothing to learn from
                index = (step * config.epochs + epoch) * config.minibatches + number
                for name, value in self._optimizer_step(experience, rows, totals, index, first=not history, learns=learns).items():
                    history[name].append(value)
        return {name: float(np.mean(values)) for name, values in history.items()}

    def _optimizer_step(
        self, experience: Experience, rows: torch.Tensor, totals: Totals, index: int, *, first: bool, learns: bool
    ) -> dict[str, float]:
        """index: of all optimizer steps of the run; learns: whether the policy does, or the critic alone."""
        from app.workers.deepspeed_engine import backward_scaled, optimizer_step

        sums: dict[str, float] = defaultdict(float)
        if self._pretraining is not None and learns:
            sums["pretraining_loss"] = self._pretraining.accumulate(self._policy, index)
        first_step_mismatch = 0.0
        norms: dict[str, float] = {}
        for minibatch, outputs in self._forward_passes(experience, rows, learns=learns):
            if first:
                first_step_mismatch = max(first_step_mismatch, self._mismatch(outputs, minibatch))
            loss = self._algorithm.loss(on_cpu(outputs), minibatch, totals)
            descended = engine_losses(loss, value_head=self._config.has_value_head, policy_learns=learns)
            for name, engine in self.engines.items():
                if name not in descended:
                    continue
                self._require_finite(name, descended[name])
                backward_scaled(engine, descended[name])
                norm = optimizer_step(engine, f"{name}, optimizer step {index + 1}")
                if norm is not None:
                    norms[f"{name}_grad_norm"] = norm
            for name, value in loss.metrics.items():
                sums[name] += value
        metrics = self._sum_over_ranks(sums)
        if first:
            metrics["first_step_mismatch"] = self._max_over_ranks(first_step_mismatch)
        return metrics | norms

    def _mismatch(self, outputs: PolicyOutputs, minibatch: Minibatch) -> float:
        """Largest |current - proximal| before any step on a batch, where both are of the same weights. Raises LearnerError beyond the
        limit: dropout, another mask or padding, or arithmetic that depends on the batch make every importance ratio wrong."""
        difference_BT = (outputs.logprobs_BT.detach().cpu() - minibatch.proximal_BT).masked_fill(~minibatch.mask_BT, 0.0)
        mismatch, limit = float(difference_BT.abs().max()), self._config.max_logprob_mismatch
        if not mismatch <= limit:
            raise LearnerError(
                f"rank {self._rank}: at the first optimizer step log-probs differ by {mismatch:.2e} nats from those before the update, "
                f"with the same weights (limit ppo.max_logprob_mismatch = {limit:.0e}): turn dropout off in the model's config, "
                "or raise the limit where the precision explains it"
            )
        return mismatch

    def _micro_batches(self, rows: torch.Tensor, tokens: TokenBatch) -> list[torch.Tensor]:
        """This rank's share of `rows`: index tensors into `tokens`."""
        shapes = [RowShape(1, length, length) for length in (tokens.prompt_lengths_B + tokens.response_lengths_B).tolist()]
        beginnings = None
        if not self._limit.padded:
            prompts = zip(tokens.ids_BS.numpy(), tokens.prompt_lengths_B.tolist(), strict=True)
            beginnings = [ids[:length].tobytes() for ids, length in prompts]
        batches = micro_batches(rows.tolist(), shapes, self._limit, rank=self._rank, world_size=self._world, beginnings=beginnings)
        return [torch.tensor(batch) for batch in batches]

    def _forward_passes(self, experience: Experience, rows: torch.Tensor, *, learns: bool) -> Iterator[tuple[Minibatch, PolicyOutputs]]:
        """This rank's micro-batches of an optimizer step with their outputs: those that `inspect` holds, else computed now."""
        held, self._held = self._held, None
        if held is not None and held.passes and torch.equal(held.tokens.ids_BS, experience.tokens.ids_BS):
            while held.passes:  # each backward pass frees its activations before the next one starts
                index, outputs = held.passes.popleft()
                self._announce(last=not held.passes)
                yield Minibatch.from_rows(experience, index), outputs
            return
        batches = self._micro_batches(rows, experience.tokens)
        for number, index in enumerate(batches):
            minibatch = Minibatch.from_rows(experience, index)
            self._announce(last=number == len(batches) - 1)
            yield minibatch, self._forward(minibatch.tokens, learns=learns)

    def _announce(self, *, last: bool) -> None:
        from app.workers.deepspeed_engine import begin_micro_batch

        for engine in self.engines.values():
            begin_micro_batch(engine, last=last)

    def _forward(self, tokens: TokenBatch, *, learns: bool = True) -> PolicyOutputs:
        moved = [x.to(self._device) for x in (tokens.ids_BS, tokens.attention_BS, tokens.prompt_lengths_B, tokens.mask_BT)]
        ids_BS, attention_BS, prompt_lengths_B, mask_BT = moved
        config = self._config
        settings = self._temperature, config.algorithm.entropy_coef > 0, not learns
        logprobs_BT, entropy_BT, values_BT = self._policy(ids_BS, attention_BS, prompt_lengths_B, mask_BT, *settings)
        if self._critic is not None:
            values_BT = gather_response(self._critic(ids_BS, attention_BS)[:, :-1], prompt_lengths_B, mask_BT)
        return PolicyOutputs(logprobs_BT, values_BT, entropy_BT)

    def _require_finite(self, name: str, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteError(f"{name} loss is {loss.item()} on rank {self._rank}, before the optimizer step: lower the learning rate")

    def _sum_over_ranks(self, sums: Mapping[str, float]) -> dict[str, float]:
        names = sorted(sums)
        vector = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(vector)
        return dict(zip(names, vector.tolist(), strict=True))

    def _max_over_ranks(self, value: float) -> float:
        vector = torch.tensor([value], dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(vector, op=torch.distributed.ReduceOp.MAX)
        return float(vector)

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[IntArray]) -> list[FloatArray]:
        """Log-probs [S-1] of whole sequences at temperature 1 (canaries); the same on every rank."""
        answers = []
        for ids in sequences:
            ids_BS = torch.from_numpy(ids.astype(np.int64))[None].to(self._device)
            one = torch.ones(1, dtype=torch.long, device=self._device)
            everything = torch.ones_like(ids_BS, dtype=torch.bool)
            logprobs_BT, _, _ = self._policy(ids_BS, everything, one, everything[:, 1:], 1.0)
            answers.append(logprobs_BT[0].cpu().numpy())
        return answers


def on_cpu(outputs: PolicyOutputs) -> PolicyOutputs:
    """Outputs [b, t] beside the experience, which lives in host memory; gradients flow through the copy."""
    values = outputs.values_BT
    return PolicyOutputs(outputs.logprobs_BT.cpu(), None if values is None else values.cpu(), outputs.entropy_BT.cpu())
