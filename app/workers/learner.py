"""The learner: policy and, where the algorithm has one, critic under DeepSpeed, in one Ray actor per rank.

Shape legend: B rollouts, T response tokens, S sequence (see app.experience).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from app.config.ppo import PpoConfig
from app.config.rollout import Transfer
from app.config.shared import OptimizerConfig
from app.data.batch_order import PassLimit
from app.experience import Experience, FloatArray, IntArray, TokenBatch
from app.workers.actor_critic import ActorCritic
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
        from app.workers.deepspeed_engine import import_deepspeed

        config = spec.config
        write_stacks_on_signal(f"learner rank {rank}")
        torch.set_num_threads(config.workers.threads)
        use_node_address()
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        device = torch.device("cuda", 0) if config.workers.gpus > 0 else torch.device("cpu")
        import_deepspeed().init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
        torch.manual_seed(spec.seed + rank)
        self._spec, self._rank = spec, rank
        self._models = build_models(spec, rank, world, device)
        scale = scale_of(config.lora) if config.lora else None
        self._outbox = PolicyOutbox(self._models.engines["policy"], scale=scale, sends=rank == 0)
        self._make_room()

    def inspect(self, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See `ActorCritic.inspect`, as for the next two."""
        return self._models.inspect(tokens)

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        return self._models.update(experience, step)

    def logprobs(self, sequences: Sequence[IntArray]) -> list[FloatArray]:
        return self._models.logprobs(sequences)

    def pushed_policy(self) -> PushedPolicy:
        """The policy as rank 0 puts it into Ray's object store. Collective."""
        policy = self._outbox.push()
        self._make_room()
        return policy

    def _make_room(self) -> None:
        """Give back what torch keeps of a shared GPU's memory for its next tensors: the engine wakes next, and it is another process."""
        if self._spec.shares_gpu:
            torch.cuda.empty_cache()

    def policy_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full parameters of the language model under its own names, adapters merged. Collective under ZeRO 3."""
        return self._outbox.merged()

    def connect_engines(self, engines: Sequence[Any], transfer: Transfer, tensor_parallel: int, address: tuple[str, int]) -> None:
        """Make ready for `send_policy`. Collective."""
        from app.workers.gpu_transfer import connect

        self._sender = connect(self, engines, transfer, rank=self._rank, tensor_parallel=tensor_parallel, address=address)

    def send_policy(self, version: int) -> None:
        """Give the policy to every engine, as `version`. Collective."""
        self._make_room()  # the engine wakes to receive it
        self._sender.send(version)
        self._make_room()  # of the buffer that it was sent in

    def save(self, folder: str) -> None:
        """Every engine and every rank's random state. Collective."""
        from app.workers.deepspeed_engine import save_engine
        from app.workers.ppo_checkpoint import describe_adapters

        for name, engine in self._models.engines.items():
            save_engine(engine, Path(folder) / name, {})
        if self._rank == 0:
            describe_adapters(Path(folder), self._spec.config.lora)

    def load(self, folder: str) -> None:
        """Restore `save`, under this learner's own optimizer settings. Raises CheckpointError if a part is missing."""
        from app.workers.deepspeed_engine import apply_settings, load_engine

        self._models.forget_passes()
        for name, engine in self._models.engines.items():
            load_engine(engine, Path(folder) / name)
            apply_settings(engine, getattr(self._spec.config, name))
        self._make_room()

    def export(self, folder: str) -> None:
        """Rank 0 writes the policy as a Hugging Face folder. Collective."""
        from app.models.load import load_tokenizer
        from app.models.saving import save_folder

        weights = dict[str, torch.Tensor]()
        for name, tensor in self.policy_parameters():  # in which every rank takes part
            if self._rank == 0:
                weights[name] = tensor.cpu().clone()
        if self._rank == 0:
            tokenizer = load_tokenizer(self._spec.policy_path, self._spec.trust_remote_code)
            save_folder(folder, self._models.engines["policy"].module.language_model, tokenizer, state_dict=weights)

    def pid(self) -> int:
        return os.getpid()


def build_models(spec: LearnerSpec, rank: int, world: int, device: torch.device) -> ActorCritic:
    """The engines of one rank, whose process group exists. Raises ModelError, ConfigError."""
    from app.models.heads import ValueHead, ValueModel
    from app.models.load import load_causal_lm
    from app.models.policy import PolicyModel
    from app.models.segments import attend_by_segment
    from app.models.trainable import choose_trainable
    from app.workers.deepspeed_engine import start_engine

    config = spec.config

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
    policy = engine(PolicyModel(language_model, head), config.policy, config.optimizer_steps(of_policy=True))
    critic = None
    if config.has_critic_model:
        model = ValueModel.from_reward_model(spec.critic_path, trust_remote_code=spec.trust_remote_code)
        packs &= config.packing and attend_by_segment(model.trunk)
        critic = engine(model, config.critic, config.optimizer_steps(of_policy=False))
    pretraining = None
    if spec.pretraining is not None and config.pretraining.coef:
        pretraining = PretrainingMix(spec.pretraining, config, spec.seed, rank, world, device, padded=not packs)
    limit = PassLimit(min(config.micro_batch_size, config.rows_per_step), config.micro_batch_tokens, padded=not packs)
    return ActorCritic(
        policy, critic, config, limit,
        temperature=spec.temperature, seed=spec.seed, rank=rank, world=world, device=device, pretraining=pretraining,
    )  # fmt: skip
