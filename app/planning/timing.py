"""How long a step takes, from counted work and the rates of the hardware.

The work is counted in `app.planning.work`; what a device reaches of its peak is a constant below. These are estimates to choose machines
by, good to about a factor of two: sequences count at their full length unless a mean length is given, and phases follow one another unless
PPO samples ahead of its learner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from app.config.ppo import PpoConfig
from app.config.recipe import Recipe
from app.config.search_space import grid
from app.config.shared import WorkersConfig
from app.config.training import TrainingConfig
from app.planning.hardware import CPU_CORE, Accelerator, Cluster
from app.planning.memory import WIDTHS
from app.planning.placement import StagePlacement
from app.planning.roles import Role
from app.planning.shapes import ModelShape, shape_of
from app.planning.simulation import Phases, step_seconds
from app.planning.trained import trained_model, value_head
from app.planning.work import backward_flop, communication, decode_flop, flop, host_adam, micro_batches

COMPUTE_SHARE = 0.4  # of peak FLOP/s in training and prefill on GPUs; peers report 0.3 to 0.5
CPU_COMPUTE_SHARE = 0.6  # docs/results/sft_speed.md
BANDWIDTH_SHARE = 0.6  # of memory bandwidth while decoding
DECODE_OVERHEAD = 0.004  # seconds of Python per decoding step
OBJECT_STORE_RATE = 0.6e9  # bytes/s of a push from gathering to loading: docs/results/smollm2.md


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


@dataclass(frozen=True)
class Timing:
    """Seconds of one step by phase; steps: how many there are, None where the data decides. A search runs that for each of its trials,
    `concurrent` at a time; to its end at most, for schedulers stop some before. overlapped: seconds of a usual step whose phases do not
    wait for each other."""

    phases: Mapping[str, float]
    steps: int | None
    trials: int = 1
    concurrent: int = 1
    overlapped: float | None = None

    @property
    def seconds_per_step(self) -> float:
        if self.overlapped is not None:
            return self.overlapped
        return sum(self.phases.values())

    @property
    def seconds(self) -> float | None:
        return None if self.steps is None else math.ceil(self.trials / self.concurrent) * self.steps * self.seconds_per_step


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

    @property
    def trials(self) -> int:
        """Of a search."""
        config = self.recipe.tune
        return len(grid(config.space)) if config.searcher == "grid" else config.trials

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
        ranks, ds, targets = config.workers.count, config.deepspeed, 0.0 if stage.name == "rm" else tokens
        model = trained_model(shape, config, shape.trunk if stage.name == "rm" else shape.parameters)
        work = flop(shape, tokens, length, targets=targets)
        work += backward_flop(shape, config, tokens, length, targets=targets, recomputed=ds.gradient_checkpointing)
        phases = {
            "compute": work / device.rate,
            "communication": communication(
                model.parameters, model.trained, ds, self.width, ranks, micro_batches(config, tokens), device.link
            ),
            "host_adam": host_adam(model.trained, ds, ranks),
        }
        rows = self.workload.rows
        steps = config.max_steps
        if rows is not None:
            of_data = math.ceil(config.epochs * rows / config.batch_size)
            steps = of_data if steps is None else min(steps, of_data)
        return Timing(phases, steps)

    def ppo(self, stage: StagePlacement) -> Timing | None:
        """One iteration of the loop: rollout, score, update, push. Trials of a search wait for each other at the scoring service."""
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

        ds, head = ppo.deepspeed, value_head(policy) if ppo.has_value_head else 0
        model = trained_model(policy, ppo, policy.parameters)
        parameters, trained = model.parameters + head, model.trained + head
        passes: list[tuple[ModelShape, PpoConfig | None, int]] = [(policy, ppo, targets)]
        if ppo.has_critic_model:
            parameters, trained = parameters + critic.trunk, trained + critic.trunk
            passes.append((critic, None, 0))
        recomputed = ds.gradient_checkpointing
        forward = sum(flop(shape, tokens, length, targets=heads) for shape, _, heads in passes)
        backward = sum(backward_flop(shape, what, tokens, length, targets=heads, recomputed=recomputed) for shape, what, heads in passes)

        judges = [("reward", recipe.scoring.reward, shape, 0) for path in recipe.reward.model_paths() if (shape := shape_of(path))]
        judges += [("reward", recipe.scoring.reward, critic, 0), ("reference", recipe.scoring.reference, policy, tokens)]
        scoring = [
            stage.trials * flop(shape, tokens, length, targets=heads) / workers.count / self.device(workers, name).rate
            for name, workers, shape, heads in judges
        ]
        steps = ppo.epochs * ppo.minibatches
        accumulation = micro_batches(ppo, ppo.rows_per_step * length)
        per_step = communication(parameters, trained, ds, self.width, ranks, accumulation, learner.link)
        longest, mixed = recipe.data.max_length, ppo.pretraining.batch_size * recipe.data.max_length if ppo.pretraining.coef else 0
        texts = flop(policy, mixed, longest, targets=mixed)
        texts += backward_flop(policy, ppo, mixed, longest, targets=mixed, recomputed=recomputed)
        update = ppo.epochs * (backward + (0 if ppo.reuse_forward else forward)) + steps * texts
        engine = next(role for role in stage.roles if role.name == "engine")
        own = forward / ranks / learner.rate
        phases = {
            "rollout": self.rollout(policy, engine, answer),
            "score": max(*scoring, own),
            "update": update / ranks / learner.rate,
            "communication": steps * per_step,
            "host_adam": steps * host_adam(trained, ds, ranks),
            "push": stage.push.trained / OBJECT_STORE_RATE if stage.push else self.width * policy.parameters / learner.link,
        }
        trials = self.trials if stage.name == "tune" else 1
        return Timing(phases, ppo.steps, trials, stage.trials, self.overlapped(phases, judging=max(scoring), own=own))

    def overlapped(self, phases: Mapping[str, float], *, judging: float, own: float) -> float | None:
        """Seconds of a usual step where engines sample ahead; reward model and reference judge as they do, and slower ones hold them up.
        own: of the score phase what the learner computes itself."""
        ppo = self.recipe.ppo
        ahead = ppo.max_lag - (ppo.prompts_carried_over > 0)
        if ahead < 1:
            return None
        learning = phases["update"] + phases["communication"] + phases["host_adam"]
        loop = Phases(max(phases["rollout"], judging), own, learning, phases["push"])
        return step_seconds(loop, max_lag=ahead, side_by_side=self.side_by_side)

    @property
    def side_by_side(self) -> float:
        """How fast engines and learners are while both work, in parts of their speed alone: on CPUs that they share."""
        busy = [workers for workers in (self.recipe.rollout.engines, self.recipe.ppo.workers) if not workers.gpus]
        asked = sum(workers.count * workers.threads for workers in busy)
        return min(1.0, sum(node.cpus for node in self.cluster.nodes) / asked) if len(busy) > 1 else 1.0

    def rollout(self, policy: ModelShape, engine: Role, answer: int) -> float:
        """Prefill, then one token of every running sequence per step; sequences beyond what the KV cache holds wait for the next wave."""
        recipe, workers = self.recipe, self.recipe.rollout.engines
        device = self.device(workers, "engine")
        prompt = recipe.data.max_prompt_length
        mine = math.ceil(recipe.ppo.batch_size / workers.count)
        parallel = workers.tensor_parallel
        room = engine.working["kv_cache"] // ((prompt + answer) * policy.kv_bytes(self.width, parallel))
        running = max(1, min(mine, room))
        waves = math.ceil(mine / running)
        read = self.width * policy.parameters + running * (prompt + answer / 2) * policy.kv_bytes(self.width)
        work = decode_flop(policy, running, prompt + answer / 2)
        per_token = max(read / (device.bandwidth * BANDWIDTH_SHARE), work / device.rate) + DECODE_OVERHEAD
        prefill = flop(policy, mine * prompt, prompt) / device.rate
        return prefill + waves * answer * per_token
