"""The learner: policy and, where the algorithm has one, critic under DeepSpeed, in one Ray actor per rank.

Shape legend: B rollouts, T response tokens, S sequence (see app.experience).
"""

from __future__ import annotations

import os
import socket
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from app.config.ppo import PpoConfig
from app.config.shared import OptimizerConfig
from app.data.batch_order import PassLimit, RowShape, micro_batches
from app.errors import LearnerError, NonFiniteError
from app.experience import Experience, FloatArray, IntArray, Minibatch, PolicyOutputs, TokenBatch, Totals
from app.numerics import gather_response
from app.workers.engine_losses import engine_losses
from app.workers.network import use_node_address
from app.workers.pretraining import PretrainingMix
from app.workers.pushed_policy import PolicyOutbox, PushedPolicy
from app.workers.stacks import write_stacks_on_signal


@dataclass(frozen=True)
class LearnerSpec:
    """What every rank builds its models from."""

    policy_path: str
    critic_path: str  # reward-model folder; read for a critic that is a model of its own
    precision: str
    temperature: float
    config: PpoConfig
    seed: int = 0
    trust_remote_code: bool = False
    pretraining: Path | None = None  # token cache of ppo.pretraining (see app.data.token_cache)
    shares_gpu: bool = False  # with an engine, in turns


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


class LearnerWorker:
    """One rank. Constructed in two steps, because rank 0's address is known only once its process runs."""

    def address(self) -> tuple[str, int]:
        """Where the process group of the learner meets: this node's address and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def start(self, spec: LearnerSpec, rank: int, world: int, address: tuple[str, int]) -> None:
        """Join the process group and build the engines."""
        from app.models.adapters import scale_of
        from app.models.heads import ValueHead, ValueModel
        from app.models.load import load_causal_lm
        from app.models.policy import PolicyModel
        from app.models.segments import attend_by_segment
        from app.models.trainable import choose_trainable
        from app.workers.deepspeed_engine import import_deepspeed, start_engine

        config = spec.config
        write_stacks_on_signal(f"learner rank {rank}")
        torch.set_num_threads(config.workers.threads)
        use_node_address()
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        self._device = torch.device("cuda", 0) if config.workers.gpus > 0 else torch.device("cpu")
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend="nccl" if self._device.type == "cuda" else "gloo", verbose=False)
        torch.manual_seed(spec.seed + rank)
        self._spec, self._rank, self._world = spec, rank, world
        self._algorithm = config.make_algorithm()
        self._held: OpenPasses | None = None

        def engine(model: torch.nn.Module, optimizer: OptimizerConfig, total_steps: int) -> Any:
            return start_engine(
                model,
                optimizer,
                config.deepspeed,
                precision=spec.precision,
                micro_batch_size=config.micro_batch_size,
                accumulation=config.accumulation,
                total_steps=total_steps,
            )

        language_model = load_causal_lm(spec.policy_path, "fp32", spec.trust_remote_code)  # DeepSpeed casts and keeps float32 masters
        packs = config.packing and attend_by_segment(language_model)
        choose_trainable(language_model, config, seed=spec.seed)
        head = None
        if config.has_value_head:
            head = ValueHead(language_model.config.get_text_config().hidden_size, seed=spec.seed)
        steps = config.optimizer_steps(of_policy=not config.has_value_head)
        self._policy = engine(PolicyModel(language_model, head), config.policy, steps)
        self._outbox = PolicyOutbox(self._policy, scale=scale_of(config.lora) if config.lora else None, sends=rank == 0)
        self._critic: Any = None
        if config.has_critic_model:
            critic = ValueModel.from_reward_model(spec.critic_path, trust_remote_code=spec.trust_remote_code)
            packs &= config.packing and attend_by_segment(critic.trunk)
            self._critic = engine(critic, config.critic, config.optimizer_steps(of_policy=False))
        self._limit = PassLimit(min(config.micro_batch_size, config.rows_per_step), config.micro_batch_tokens, padded=not packs)
        self._pretraining: PretrainingMix | None = None
        if spec.pretraining is not None and config.pretraining.coef:
            self._pretraining = PretrainingMix(spec.pretraining, config, spec.seed, rank, world, self._device, padded=not packs)

    def inspect(self, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(rows, log-probs, values) of this rank's share of the batch; the last two float32 [b, T], no values without a critic."""
        length = tokens.mask_BT.shape[1]
        reuse = self._spec.config.reuse_forward
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
        config = self._spec.config
        learns = config.policy_learns(step)
        if config.has_value_head and not learns:
            self._held = None  # those passes would carry gradients through the trunk
        history: dict[str, list[float]] = defaultdict(list)
        for epoch in range(config.epochs):
            minibatches = minibatch_rows(len(experience.tokens), config.minibatches, seed=self._spec.seed + step, epoch=epoch)
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
            descended = engine_losses(loss, value_head=self._spec.config.has_value_head, policy_learns=learns)
            for name, engine in self._engines():
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
        mismatch, limit = float(difference_BT.abs().max()), self._spec.config.max_logprob_mismatch
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

        for engine in (self._policy, self._critic):
            if engine is not None:
                begin_micro_batch(engine, last=last)

    def _forward(self, tokens: TokenBatch, *, learns: bool = True) -> PolicyOutputs:
        moved = [x.to(self._device) for x in (tokens.ids_BS, tokens.attention_BS, tokens.prompt_lengths_B, tokens.mask_BT)]
        ids_BS, attention_BS, prompt_lengths_B, mask_BT = moved
        config = self._spec.config
        settings = self._spec.temperature, config.algorithm.entropy_coef > 0, not learns
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
        """Log-probs [S-1] of whole sequences at temperature 1 (canaries). Every rank takes part; all answer the same."""
        answers = []
        for ids in sequences:
            ids_BS = torch.from_numpy(ids.astype(np.int64))[None].to(self._device)
            one = torch.ones(1, dtype=torch.long, device=self._device)
            everything = torch.ones_like(ids_BS, dtype=torch.bool)
            logprobs_BT, _, _ = self._policy(ids_BS, everything, one, everything[:, 1:], 1.0)
            answers.append(logprobs_BT[0].cpu().numpy())
        return answers

    def pushed_policy(self) -> PushedPolicy:
        """The policy as rank 0 puts it into Ray's object store. Collective."""
        policy = self._outbox.push()
        if self._spec.shares_gpu:
            torch.cuda.empty_cache()  # what the update has used: the engine is the next to want it, and it is another process
        return policy

    def policy_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full parameters of the language model under its own names, adapters merged. Collective under ZeRO 3."""
        return self._outbox.merged()

    def connect_nccl(self, engines: Sequence[Any], tensor_parallel: int, address: tuple[str, int]) -> None:
        """Open the NCCL group of rank 0 and all engine workers."""
        from app.workers.nccl_transfer import connect

        self._nccl = connect(self, engines, rank=self._rank, tensor_parallel=tensor_parallel, address=address)

    def broadcast_nccl(self, version: int) -> None:
        """Send the policy to every engine, as `version`. Collective."""
        self._nccl.send(version)

    def save(self, folder: str) -> None:
        """Every engine and every rank's random state. Collective."""
        from app.workers.deepspeed_engine import save_engine
        from app.workers.ppo_checkpoint import describe_adapters

        for name, engine in self._engines():
            save_engine(engine, Path(folder) / name, {})
        if self._rank == 0:
            describe_adapters(Path(folder), self._spec.config.lora)

    def load(self, folder: str) -> None:
        """Restore `save`, under this learner's own optimizer settings. Raises CheckpointError if a part is missing."""
        from app.workers.deepspeed_engine import apply_settings, load_engine

        self._held = None
        for name, engine in self._engines():
            load_engine(engine, Path(folder) / name)
            apply_settings(engine, getattr(self._spec.config, name))

    def _engines(self) -> list[tuple[str, Any]]:
        return [(name, engine) for name, engine in (("policy", self._policy), ("critic", self._critic)) if engine is not None]

    def export(self, folder: str) -> None:
        """Rank 0 writes the policy as a Hugging Face folder. Collective."""
        from app.models.load import load_tokenizer
        from app.models.saving import save_folder

        weights = {name: tensor.cpu().clone() for name, tensor in self.policy_parameters()}
        if self._rank == 0:
            tokenizer = load_tokenizer(self._spec.policy_path, self._spec.trust_remote_code)
            save_folder(folder, self._policy.module.language_model, tokenizer, state_dict=weights)

    def pid(self) -> int:
        return os.getpid()


def on_cpu(outputs: PolicyOutputs) -> PolicyOutputs:
    """Outputs [b, t] beside the experience, which lives in host memory; gradients flow through the copy."""
    values = outputs.values_BT
    return PolicyOutputs(outputs.logprobs_BT.cpu(), None if values is None else values.cpu(), outputs.entropy_BT.cpu())
