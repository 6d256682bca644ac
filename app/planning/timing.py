"""How long a step takes, from counted work and the rates of the hardware.

FLOP are counted as 2 per weight and token forward, twice that backward (Kaplan et al., 2020, https://arxiv.org/abs/2001.08361), plus
causal attention; what a device reaches of its peak is a constant below. These are estimates to choose machines by, good to about a
factor of two: sequences count at their full length unless a mean length is given, and phases follow one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from app.config.recipe import Recipe
from app.config.shared import DeepSpeedConfig, WorkersConfig
from app.config.training import TrainingConfig
from app.planning.hardware import CPU_CORE, Accelerator, Cluster
from app.planning.memory import MASTER, MOMENTS, WIDTHS, value_head
from app.planning.placement import StagePlacement
from app.planning.roles import Role
from app.planning.shapes import ModelShape, shape_of

COMPUTE_SHARE = 0.4  # of peak FLOP/s in training and prefill on GPUs; peers report 0.3 to 0.5
CPU_COMPUTE_SHARE = 0.6  # docs/results/sft_speed.md
BANDWIDTH_SHARE = 0.6  # of memory bandwidth while decoding
DECODE_OVERHEAD = 0.004  # seconds of Python per decoding step
HOST_ADAM_BANDWIDTH = 10e9  # bytes/s of one process that runs Adam on the host
OBJECT_STORE_RATE = 0.6e9  # bytes/s of a push from gathering to loading: docs/results/smollm2.md
FORWARD, BACKWARD = 2, 4


@dataclass(frozen=True)
class Device:
    """What one process of a role computes on."""

    rate: float
    bandwidth: float
    link: float

    @classmethod
    def of(cls, workers: WorkersConfig, gpu: Accelerator | None, width: int, network: float) -> Device:
        """network: bytes/s that one process gets between nodes; infinite where all are on one."""
        if workers.gpus and gpu is not None:
            share = min(1.0, workers.gpus) if workers.gpus < 1 else math.floor(workers.gpus)
            return cls(gpu.rate(width) * COMPUTE_SHARE * share, gpu.bandwidth * share, min(gpu.link, network))
        rate = CPU_CORE.rate(width) * CPU_COMPUTE_SHARE
        return cls(rate * workers.threads, CPU_CORE.bandwidth * workers.threads, min(CPU_CORE.link, network))


def flop(shape: ModelShape, tokens: float, length: float, *, targets: float = 0.0, per_weight: float = FORWARD) -> float:
    """Of a pass over `tokens` in sequences of `length`, with the output head on `targets` of them."""
    weights = shape.layers * shape.layer * tokens + shape.embedding * targets
    attention = shape.layers * shape.queries * length * tokens
    return per_weight * (weights + attention)


def communication(parameters: int, ds: DeepSpeedConfig, width: int, ranks: int, accumulation: int, link: float) -> float:
    """Seconds of collectives in one optimizer step: gradients, and parameters where they are sharded."""
    if ranks == 1:
        return 0.0
    gradients = accumulation if ds.zero_stage >= 2 else 1
    parameter_gathers = {0: 0, 1: 1, 2: 1, 3: 2 * accumulation}[ds.zero_stage]
    return (gradients + parameter_gathers) * width * parameters / link


def host_adam(parameters: int, ds: DeepSpeedConfig, ranks: int) -> float:
    """Seconds of Adam on the host in one optimizer step: it reads and writes master weights and moments, and reads gradients."""
    return (2 * (MASTER + MOMENTS) + 4) * parameters / ranks / HOST_ADAM_BANDWIDTH if ds.offload_optimizer else 0.0


@dataclass(frozen=True)
class Timing:
    """Seconds of one step by phase; steps: how many there are, None where the data decides."""

    phases: Mapping[str, float]
    steps: int | None

    @property
    def seconds_per_step(self) -> float:
        return sum(self.phases.values())

    @property
    def seconds(self) -> float | None:
        return None if self.steps is None else self.steps * self.seconds_per_step


@dataclass(frozen=True)
class Workload:
    """What the recipe leaves open. mean_length: tokens of a usual sequence (SFT, reward model) or answer (PPO); rows: of the data set."""

    mean_length: int | None = None
    rows: int | None = None


def stage_timing(recipe: Recipe, stage: StagePlacement, cluster: Cluster, workload: Workload, nodes_of: Mapping[str, int]) -> Timing | None:
    """Timing of a stage that has steps; None for one that has none, or whose models are of unknown size.

    nodes_of: how many nodes each role's processes are on.
    """
    builder = Estimate(recipe, cluster, workload, nodes_of)
    if stage.name == "sft":
        return builder.supervised(stage, recipe.sft)
    if stage.name == "rm":
        return builder.supervised(stage, recipe.rm)
    return builder.ppo(stage) if stage.name in ("ppo", "tune") else None


@dataclass(frozen=True)
class Estimate:
    """Timings of one recipe on one cluster."""

    recipe: Recipe
    cluster: Cluster
    workload: Workload
    nodes_of: Mapping[str, int]

    @property
    def width(self) -> int:
        return WIDTHS[self.recipe.model.precision]

    def device(self, workers: WorkersConfig, role: str) -> Device:
        machine = max(self.cluster.nodes, key=lambda node: node.gpus)
        shared = max(1, machine.gpus)
        network = machine.network / shared if self.nodes_of.get(role, 1) > 1 else math.inf
        return Device.of(workers, machine.gpu, self.width, network)

    def supervised(self, stage: StagePlacement, config: TrainingConfig) -> Timing | None:
        """SFT or the reward model."""
        shape = shape_of(self.recipe.model.path)
        if shape is None:
            return None
        length = self.workload.mean_length or self.recipe.data.max_length
        replies = self.recipe.rm.max_replies if stage.name == "rm" else 1
        tokens = config.batch_size * replies * length / config.workers.count
        device = self.device(config.workers, stage.name)
        per_weight = FORWARD + BACKWARD + FORWARD * config.deepspeed.gradient_checkpointing
        work = flop(shape, tokens, length, targets=0 if stage.name == "rm" else tokens, per_weight=per_weight)
        ranks, ds = config.workers.count, config.deepspeed
        phases = {
            "compute": work / device.rate,
            "communication": communication(shape.parameters, ds, self.width, ranks, config.accumulation, device.link),
            "host_adam": host_adam(shape.parameters, ds, ranks),
        }
        rows = self.workload.rows
        steps = config.max_steps
        if rows is not None:
            of_data = math.ceil(config.epochs * rows / config.batch_size)
            steps = of_data if steps is None else min(steps, of_data)
        return Timing(phases, steps)

    def ppo(self, stage: StagePlacement) -> Timing | None:
        """One iteration of the loop: rollout, score, update, push."""
        recipe, ppo = self.recipe, self.recipe.ppo
        # a critic is made of a reward model
        policy, critic = shape_of(recipe.model.path), shape_of(recipe.reward.path or recipe.model.path)
        if policy is None or critic is None:
            return None
        answer = min(self.workload.mean_length or recipe.rollout.max_new_tokens, recipe.rollout.max_new_tokens)
        length = recipe.data.max_prompt_length + answer
        tokens, targets = ppo.batch_size * length, ppo.batch_size * answer
        learner = self.device(ppo.workers, "learner")
        ranks = ppo.workers.count

        trained = [(policy, targets, policy.parameters + (value_head(policy) if ppo.has_value_head else 0))]
        if ppo.has_critic_model:
            trained.append((critic, 0, critic.trunk))

        def learning(per_weight: float) -> float:
            work = sum(flop(shape, tokens, length, targets=heads, per_weight=per_weight) for shape, heads, _ in trained)
            return work / ranks / learner.rate

        scorers = {"reward": (recipe.scoring.reward, critic, 0), "reference": (recipe.scoring.reference, policy, tokens)}
        scoring = [
            flop(shape, tokens, length, targets=heads) / workers.count / self.device(workers, name).rate
            for name, (workers, shape, heads) in scorers.items()
        ]
        recomputed = FORWARD * ppo.deepspeed.gradient_checkpointing
        forward = 0 if ppo.reuse_forward else FORWARD
        parameters, steps = sum(size for *_, size in trained), ppo.epochs * ppo.minibatches
        per_step = communication(parameters, ppo.deepspeed, self.width, ranks, ppo.accumulation, learner.link)
        longest, mixed = recipe.data.max_length, ppo.pretraining.batch_size * recipe.data.max_length if ppo.pretraining.coef else 0
        texts = flop(policy, mixed, longest, targets=mixed, per_weight=FORWARD + BACKWARD + recomputed)
        engine = next(role for role in stage.roles if role.name == "engine")
        phases = {
            "rollout": self.rollout(policy, engine, answer),
            "score": max(*scoring, learning(FORWARD)),
            "update": ppo.epochs * learning(forward + BACKWARD + recomputed) + steps * texts / ranks / learner.rate,
            "communication": steps * per_step,
            "host_adam": steps * host_adam(parameters, ppo.deepspeed, ranks),
            "push": stage.pushed / OBJECT_STORE_RATE if stage.pushed else self.width * policy.parameters / learner.link,
        }
        return Timing(phases, ppo.steps)

    def rollout(self, policy: ModelShape, engine: Role, answer: int) -> float:
        """Prefill, then one token of every running sequence per step; sequences beyond what the KV cache holds wait for the next wave."""
        recipe, workers = self.recipe, self.recipe.rollout.engines
        device = self.device(workers, "engine")
        prompt = recipe.data.max_prompt_length
        mine = math.ceil(recipe.ppo.batch_size / workers.count)
        parallel = max(1, int(workers.gpus))
        room = engine.working["kv_cache"] * parallel // ((prompt + answer) * policy.kv_bytes(self.width))
        running = max(1, min(mine, room))
        waves = math.ceil(mine / running)
        read = self.width * policy.parameters + running * (prompt + answer / 2) * policy.kv_bytes(self.width)
        work = flop(policy, running, prompt + answer / 2, targets=running)
        per_token = max(read / (device.bandwidth * BANDWIDTH_SHARE), work / device.rate) + DECODE_OVERHEAD
        prefill = flop(policy, mine * prompt, prompt) / device.rate
        return prefill + waves * answer * per_token
