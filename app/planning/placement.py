"""What each command asks of a cluster, computed from the recipe alone.

Stages run one after another, so a command needs the maximum over its stages; the roles of one stage are alive
together, so their processes add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.errors import PlacementError
from app.planning.memory import GIB
from app.planning.packing import NodeResources, Slot, assign, gpus_needed
from app.planning.roles import FLOAT32, Role, Roles
from app.planning.shapes import shape_of
from app.planning.trained import trained_model

Section = Literal["sft", "rm", "ppo"]
STARTED = (("rollout", "training", "scoring"), ("scoring", "training", "rollout"))
"""The order in which processes start, by what they do: of any stage, and of a search, whose trials come to a service that is there."""
_OBJECT_STORE_SHARE = 0.3  # Ray's default part of a node's memory; what does not fit there goes to the disk


@dataclass(frozen=True)
class Push:
    """A policy on its way through Ray's object store, float32. trained: bytes of one version; frozen: of what is put there once."""

    trained: int
    frozen: int = 0

    @property
    def at_the_learner(self) -> int:
        """The version before stays until the engines have been given the next one."""
        return self.frozen + 2 * self.trained

    @property
    def at_an_engine(self) -> int:
        return self.frozen + self.trained


@dataclass(frozen=True)
class StagePlacement:
    """The roles that are alive together. overlapping: they work at the same time, not in turns; push: of each trial, where weights go
    through the object store; trials: at a time."""

    name: str
    roles: tuple[Role, ...]
    overlapping: bool = False
    push: Push | None = None
    trials: int = 1

    def need(self, resource: str) -> float:
        """Of `CPU`, `memory` (bytes) or `GPU`: whole ones, for no process spans fractions of two."""
        if resource != "GPU":
            return sum(role.need(resource) for role in self.roles)
        own = [(role.count, role.request.own_gpus) for role in self.roles]
        fractions = [gpus for count, gpus in own if 0 < gpus < 1 for _ in range(count)]
        return float(sum(count * gpus for count, gpus in own if gpus >= 1) + gpus_needed(fractions))

    def slots(self, nodes: tuple[NodeResources, ...]) -> tuple[Slot, ...]:
        """Where every process goes. Raises PlacementError."""
        starting = sorted(self.roles, key=lambda role: STARTED[self.name == "tune"].index(role.turn))
        placed = assign([role.request for role in starting], nodes, self.name)
        return tuple(slot for role in self.roles for slot in placed if slot.role == role.name)

    def object_store(self, there: Iterable[Slot], node_memory: float) -> int:
        """Bytes of Ray's object store on a node with these processes: the first rank of a learner puts weights there, and the store of
        every node with engines gets a copy."""
        if self.push is None:
            return 0
        each = {role.name: role.count // self.trials for role in self.roles}
        by_role = {name: [slot.index for slot in there if slot.role == name] for name in ("learner", "engine")}
        puts = {index // each["learner"] for index in by_role["learner"] if index % each["learner"] == 0}
        gets = {index // each["engine"] for index in by_role["engine"]} - puts
        held = len(puts) * self.push.at_the_learner + len(gets) * self.push.at_an_engine
        return min(held, int(_OBJECT_STORE_SHARE * node_memory))


def engines_load_early(recipe: Recipe) -> bool:
    """Whether the rollout engines may load while the reward model trains; engines with GPUs wait until its workers have left theirs."""
    return recipe.rollout.engines.gpus == 0


def placement(recipe: Recipe, command: str, gpu_memory: int | None = None) -> tuple[StagePlacement, ...]:
    """The stages of a command, in the order they run. `command` is one of sft, rm, ppo, pipeline, tune, serve, evaluate, samples.

    `rm`, `ppo` and `tune` on the embedded model include the stages that train what they start from. gpu_memory: see `Roles`.
    """
    roles = Roles(recipe, gpu_memory)
    sft = StagePlacement("sft", (roles.trainers("sft", recipe.sft),))
    before_rm = (sft,) if recipe.model.path == "embedded" else ()
    rm = _reward_model(recipe, roles)
    before_ppo = (*before_rm, *rm) if before_rm and recipe.reward.path is None else before_rm
    trials = 1 if recipe.tune.concurrent == "auto" else min(recipe.tune.concurrent, recipe.tune.trials)
    ppo = _ppo(recipe, "ppo", roles.ppo(), 1)
    stages = {
        "sft": (sft,),
        "rm": (*before_rm, *rm),
        "ppo": (*before_ppo, ppo),
        "pipeline": (sft, *rm, ppo),
        "tune": (*before_ppo, _ppo(recipe, "tune", roles.trials(trials), trials)),
        "serve": (StagePlacement("serve", roles.served()),),
        "evaluate": (StagePlacement("evaluation", (roles.engines(), *roles.scorers())),),
        "samples": (StagePlacement("samples", (roles.engines(),)),),
    }
    return stages[command]


def trained_sections(recipe: Recipe, command: str) -> tuple[Section, ...]:
    """The sections of the recipe that say how a model is trained by this command, in the order of its stages."""
    of_stage: dict[str, Section] = {"sft": "sft", "rm": "rm", "ppo": "ppo", "tune": "ppo"}
    return tuple(of_stage[stage.name] for stage in placement(recipe, command) if stage.name in of_stage)


def _reward_model(recipe: Recipe, roles: Roles) -> tuple[StagePlacement, ...]:
    """The training, and the SFT answers whose mean score becomes the offset."""
    trainers, engine = roles.trainers("rm", recipe.rm), roles.engines()
    if engines_load_early(recipe):
        return (StagePlacement("rm", (trainers, engine), overlapping=True),)
    return StagePlacement("rm", (trainers,)), StagePlacement("rm offset", (engine,))


def _ppo(recipe: Recipe, name: str, roles: tuple[Role, ...], trials: int) -> StagePlacement:
    """A push carries what is trained of the policy as float32, unless it goes from GPU to GPU."""
    shape, rollout, push = shape_of(recipe.model.path), recipe.rollout, None
    if shape is not None and rollout.chosen_transfer == "object_store":
        policy = trained_model(shape, recipe.ppo, shape.parameters)
        push = Push(FLOAT32 * policy.trained, FLOAT32 * (policy.parameters - policy.trained))
    return StagePlacement(name, roles, overlapping=recipe.ppo.max_lag > 0, push=push, trials=trials)


def concurrent_trials(recipe: Recipe, resources: Mapping[str, float], nodes: tuple[NodeResources, ...] = ()) -> int:
    """`tune.concurrent`, or with auto how many of its trials find room at the same time beside the one scoring service, at least 1.

    Arguments as in `check_feasible`."""
    if recipe.tune.concurrent != "auto":
        return min(recipe.tune.concurrent, recipe.tune.trials)
    for trials in range(recipe.tune.trials, 1, -1):
        sized = recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"concurrent": trials})})
        try:
            check_feasible(sized, "tune", resources, nodes)
        except PlacementError:
            continue
        return trials
    return 1


_UNITS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GiB of memory"}


def check_feasible(recipe: Recipe, command: str, resources: Mapping[str, float], nodes: tuple[NodeResources, ...] = ()) -> None:
    """Raise PlacementError when a stage needs more `CPU`, `GPU` or `memory` (bytes) than `resources` has in all, or finds no place.

    A resource that the mapping does not name counts as absent, except memory, which is then not checked. nodes: where the
    processes have to find room, one by one; not checked without any. Of rollout engines that may come later only those count that
    have to be there; in a trial all of them, because its placement group is given whole or not at all.
    """
    for stage in _at_the_start(recipe, command):
        for resource in ("GPU", "CPU", "memory"):
            if resource == "memory" and resource not in resources:
                continue
            have, need = resources.get(resource, 0.0), stage.need(resource)
            if need > have + 1e-6:
                raise PlacementError(_shortage(stage, resource, need, have))
        if nodes:
            stage.slots(nodes)


def _at_the_start(recipe: Recipe, command: str) -> tuple[StagePlacement, ...]:
    """The stages with the processes that each waits for."""
    stages = placement(recipe, command)
    if recipe.rollout.min_engines is None:
        return stages
    fewest = placement(with_values(recipe, {"rollout.engines.count": recipe.rollout.min_engines}), command)
    return tuple(stage if stage.name == "tune" else least for stage, least in zip(stages, fewest, strict=True))


def _shortage(stage: StagePlacement, resource: str, need: float, have: float) -> str:
    scale = GIB if resource == "memory" else 1
    roles = [role for role in stage.roles if role.need(resource) > 0]
    parts = ", ".join(f"{role.name} {role.count} x {role.need(resource) / role.count / scale:.3g}" for role in roles)
    largest = max(roles, key=lambda role: role.need(resource))
    knob = {"GPU": f"{largest.key}.count or {largest.key}.gpus", "CPU": f"{largest.key}.count or {largest.key}.cpus"}
    lower = knob.get(resource, f"{largest.key}.count, or take a smaller model")
    if any(role.name == "trial" and role.count > 1 for role in roles):
        lower = f"tune.concurrent, {lower}"
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
                    role.name: {
                        "count": role.count,
                        "cpus": role.cpus,
                        "gpus": role.gpus,
                        "threads": role.threads,
                        "shares": role.shares,
                    }
                    for role in stage.roles
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
            **(
                {"micro_batch_tokens": config.micro_batch_tokens, "accumulation": f"up to {config.accumulation}"}
                if config.micro_batch_tokens
                else {"micro_batch_size": config.micro_batch_size, "accumulation": config.accumulation}
            ),
            "steps": config.max_steps or f"{config.epochs:g} epochs of the data / {config.batch_size}",
        }
    if stage in ("ppo", "tune"):
        ppo = recipe.ppo
        sizes = {
            "steps": ppo.steps,
            "rollouts_per_step": ppo.batch_size,
            "epochs": ppo.epochs,
            "minibatches": ppo.minibatches,
            **(
                {"micro_batch_tokens": ppo.micro_batch_tokens, "accumulation": f"up to {ppo.accumulation}"}
                if ppo.micro_batch_tokens
                else {"micro_batch_size": min(ppo.micro_batch_size, ppo.rows_per_step), "accumulation": ppo.accumulation}
            ),
            "optimizer_steps": ppo.steps * ppo.epochs * ppo.minibatches,
            "rollouts": ppo.steps * ppo.batch_size,
            "max_response_tokens": ppo.steps * ppo.batch_size * recipe.rollout.max_new_tokens,
        }
        return sizes | ({"trials": recipe.tune.trials, "concurrent": recipe.tune.concurrent} if stage == "tune" else {})
    return {"prompts": recipe.evaluation.prompts} if stage == "evaluation" else {}
