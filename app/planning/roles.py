"""The roles of a recipe: how many processes each has, what they take of a node and what they hold in memory, no Ray and no model.

Sizes come from the `config.json` of a local model, or from a model's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from app.config.ppo import PpoConfig
from app.config.recipe import Recipe
from app.config.shared import WorkersConfig
from app.config.training import TrainingConfig
from app.planning.learner import learner_models
from app.planning.memory import (
    GIB,
    WIDTHS,
    Batch,
    Parts,
    Trained,
    TrainingMemory,
    add,
    cpu_engine_memory,
    engine_memory,
    inspection,
    largest_pass,
    scoring_memory,
    total,
    training_memory,
)
from app.planning.packing import Request, Strategy
from app.planning.shapes import shape_of
from app.planning.trained import trained_model

FLOAT32 = 4
_PROCESS_BYTES = GIB // 2  # a Python process with torch and Ray loaded
_CUDA_HOST_BYTES = GIB  # what a process with a GPU holds on the host beside that
TRIAL_CPUS = 0.01  # a trial's own process only waits for its actors

Turn = Literal["training", "rollout", "scoring"]


@dataclass(frozen=True)
class Role:
    """Processes of one kind.

    working: bytes of each on its device at its peak (a GPU; host memory where it has none); resting: while others work; judging: while
    reward model and reference do; host: in host memory beside that. As far as the recipe tells: parts are empty for a model of unknown
    size.
    """

    name: str
    key: str
    count: int
    cpus: float
    gpus: float
    threads: int
    labels: Mapping[str, str]
    working: Parts
    resting: Parts
    judging: Parts
    host: Parts
    turn: Turn
    strategy: Strategy = "spread"
    shares: str | None = None

    @property
    def memory(self) -> int:
        """Host memory of each, bytes."""
        return total(self.host) + (0 if self.gpus else total(self.working))

    def need(self, resource: str) -> float:
        """Of `CPU`, `GPU` (parts of them as they are reserved) or `memory` (bytes), over all processes."""
        each: float = {"CPU": self.cpus, "GPU": self.request.own_gpus, "memory": self.memory}[resource]
        return self.count * each

    @property
    def request(self) -> Request:
        """Its processes for `app.planning.packing`; memory is no resource that Ray reserves."""
        return Request(self.name, self.count, self.cpus, self.gpus, strategy=self.strategy, shares=self.shares, labels=self.labels)


@dataclass(frozen=True)
class Roles:
    """Builds the roles of a recipe. gpu_memory: bytes of a GPU that the engines may fill; None takes the least that works."""

    recipe: Recipe
    gpu_memory: int | None = None
    width: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", WIDTHS[self.recipe.model.precision])

    def trainers(self, name: str, config: TrainingConfig) -> Role:
        """SFT's or the reward model's workers."""
        shape = shape_of(self.recipe.model.path)
        reward_model = name == "rm"
        replies = self.recipe.rm.max_replies if reward_model else 1
        most = replies * config.batch_size // config.workers.count
        rows, length = largest_pass(
            replies * config.micro_batch_size, self.recipe.data.max_length, tokens=config.micro_batch_tokens, most=most, least=replies
        )
        models, loaded = [], 0
        if shape is not None:
            parameters = shape.trunk if reward_model else shape.parameters
            batch = Batch(rows, length, 0 if reward_model else rows * (length - 1))
            models = [trained_model(shape, config, parameters, batch)]
            loaded = (FLOAT32 if reward_model else self.width) * parameters
        return self._training_role(name, f"{name}.workers", config.workers, self._memory(models, config), loaded)

    def learner(self) -> Role:
        """Policy and critic of PPO, in one process per rank."""
        ppo, models = self.recipe.ppo, learner_models(self.recipe, self.width)
        loaded = FLOAT32 * max((model.parameters for model in models.learning), default=0)
        learner = self._training_role("learner", "ppo.workers", ppo.workers, self._memory(models.learning, ppo), loaded)
        passes = (inspection(model, ppo.deepspeed, self.width, kept=ppo.reuse_forward) for model in models.judging)
        return replace(learner, judging=add(learner.resting, *passes))

    def _memory(self, models: Sequence[Trained], config: TrainingConfig | PpoConfig) -> TrainingMemory:
        workers = config.workers
        ds = config.deepspeed.in_effect(self.recipe.model.precision, workers.count)
        return training_memory(models, ds, width=self.width, ranks=workers.count, on_gpu=workers.gpus > 0)

    def _training_role(self, name: str, key: str, workers: WorkersConfig, memory: TrainingMemory, loaded: int) -> Role:
        # while it loads, each process holds its model in host memory, before anything is offloaded to there
        loading = {"loading": max(0, loaded - total(memory.host))} if workers.gpus else {}
        host = {**_process(workers), **memory.host, **loading}
        return _role(name, key, workers, memory.working, memory.resting, host, turn="training", strategy="pack")

    def engines(self, *, colocated: bool = False) -> Role:
        """vLLM's rollout engines; colocated: on the learners' GPUs, asleep while these work."""
        recipe, workers = self.recipe, self.recipe.rollout.engines
        shape = shape_of(recipe.model.path)
        context = recipe.rollout.max_model_len or recipe.data.max_prompt_length + recipe.rollout.max_new_tokens
        working = self._vllm(
            recipe.model.path, workers, context, share=recipe.rollout.gpu_memory_utilization, kv_cache_gib=recipe.rollout.kv_cache_gib
        )
        copy = 0 if shape is None else self.width * shape.parameters
        host = {**_process(workers), **({"sleep_copy": copy} if colocated else {})}
        shares = "learner" if colocated else None
        return _role("engine", "rollout.engines", workers, working, {} if colocated else working, host, turn="rollout", shares=shares)

    def _vllm(self, path: str, workers: WorkersConfig, context: int, *, share: float, kv_cache_gib: float) -> Parts:
        """An engine on each of its GPUs, which `share` of the memory is reserved of; in host memory without any."""
        shape, cache = shape_of(path), int(kv_cache_gib * GIB)
        if not workers.gpus:
            return {"kv_cache": cache} if shape is None else cpu_engine_memory(shape, width=self.width, kv_cache=cache)
        if shape is None:
            return {}
        reserved = None if self.gpu_memory is None else int(share * self.gpu_memory)
        parallel = workers.tensor_parallel
        return engine_memory(shape, width=self.width, tensor_parallel=parallel, context=context, reserved=reserved)

    def scorers(self) -> tuple[Role, ...]:
        """The scoring service's replicas."""
        recipe, scoring = self.recipe, self.recipe.scoring
        length = recipe.data.max_prompt_length + recipe.rollout.max_new_tokens
        further = [(f"reward {path}", path) for path in recipe.reward.model_paths() if path != recipe.reward.path]
        places = [("reward", "scoring.reward", scoring.reward, recipe.reward.path or recipe.model.path)]
        places += [(name, "scoring.reward", scoring.reward, path) for name, path in further]
        places.append(("reference", "scoring.reference", scoring.reference, recipe.model.path))
        return tuple(
            self._scorer(name, key, workers, path, scoring.max_batch_tokens, length, with_head=name == "reference")
            for name, key, workers, path in places
        )

    def _scorer(self, name: str, key: str, workers: WorkersConfig, path: str, tokens: int, length: int, *, with_head: bool) -> Role:
        shape, parts = shape_of(path), Parts()
        if shape is not None:
            parts = scoring_memory(shape, width=self.width, tokens=tokens, length=length, with_head=with_head)
        resting = {part: size for part, size in parts.items() if part == "weights"}
        return _role(name, key, workers, parts, resting, _process(workers), turn="scoring")

    def served(self) -> tuple[Role, ...]:
        """What `corral serve` runs: the models that the recipe names, else those that PPO would score with."""
        serving, length = self.recipe.serving, self.recipe.data.max_length
        if not serving.models and not serving.chat:
            return self.scorers()
        roles = []
        for name, model in serving.models.items():
            place = (name, f"serving.models.{name}.workers", model.workers, model.path, model.batching.max_batch_tokens)
            roles.append(self._scorer(*place, length, with_head=model.kind != "reward"))
        for name, chat in serving.chat.items():
            working = self._vllm(
                chat.path, chat.workers, chat.max_model_len, share=chat.gpu_memory_utilization, kv_cache_gib=chat.kv_cache_gib
            )
            roles.append(
                _role(name, f"serving.chat.{name}.workers", chat.workers, working, working, _process(chat.workers), turn="rollout")
            )
        return tuple(roles)

    def ppo(self) -> tuple[Role, ...]:
        """Learners and engines, and the scoring service."""
        learner, engine = self.learner(), self.engines(colocated=self.recipe.rollout.shares_gpus)
        if engine.shares:  # a pair reserves what both ask for, and a whole GPU at most
            learner = replace(learner, gpus=min(1.0, learner.gpus + engine.gpus))
        return (learner, engine, *self.scorers())

    def trials(self, concurrent: int) -> tuple[Role, ...]:
        """So many PPO runs at a time, each with a process of its own and engines on GPUs of their own, and the one scoring service of
        them all."""
        own = WorkersConfig(cpus=TRIAL_CPUS)
        trial = _role("trial", "tune", own, Parts(), Parts(), _process(own), turn="training")
        return (*(replace(role, count=role.count * concurrent) for role in (self.learner(), self.engines(), trial)), *self.scorers())


def _process(workers: WorkersConfig) -> Parts:
    return {"process": _PROCESS_BYTES + (_CUDA_HOST_BYTES if workers.gpus else 0)}


def _role(name: str, key: str, workers: WorkersConfig, working: Parts, resting: Parts, host: Parts, **more: Any) -> Role:
    judging = more.pop("judging", resting)
    return Role(
        name, key, workers.count, workers.cpus, workers.gpus, workers.threads, workers.labels, working, resting, judging, host, **more
    )
