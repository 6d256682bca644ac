"""The search space of a recipe: its checks, and drawing from it. Pure functions over the domains of `tune.space`."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from app.config.tune import POPULATION, Choice, Conditional, Domain, Integer, TuneConfig, Uniform
from app.errors import ConfigError

Space = Mapping[str, Domain]
TRIALS_OWN = ("ppo.", "rollout.", "reward.parts.", "reward.combine")
SHARED = ("ppo.steps", "ppo.workers", "rollout.engines", "rollout.temperature")
"""Trials have one length and one size, and one scoring service computes the reference's log-probs at one temperature for all."""
FIXED_IN_A_POPULATION = (
    *("ppo.deepspeed", "ppo.algorithm.name", "ppo.critic_model", "ppo.freeze_layers", "ppo.lora"),
    *("reward", "ppo.reward.delta", "ppo.reward.scale"),
)
"""A population copies checkpoints from trial to trial: these decide what a checkpoint holds, or what its scores, and the moments of them
that ppo.reward.scale divides by, mean."""
BATCH_IN_PROMPTS = ("ppo.batch_size", "ppo.samples_per_prompt")
SAMPLE = 128
"""Configurations drawn to see whether the recipe takes what a searcher may come to: of those refused one in 20, all but one space in
700 show it."""


class Suggestions(Protocol):
    """An Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


def differs_by_trial(name: str) -> bool:
    """Whether a recipe key may have a value of its own in every trial."""
    return name.startswith(TRIALS_OWN) and not any(f"{name}.".startswith(f"{shared}.") for shared in SHARED) and not name.endswith(".path")


def ordered(space: Space) -> dict[str, Domain]:
    """The space with every key behind those that its `when` reads. Raises ConfigError where one is not in the space, a condition never
    holds, or conditions go in a circle."""
    placed: dict[str, Domain] = {}
    for name, domain in space.items():
        _check_conditions(name, domain, space)
    while len(placed) < len(space):
        ready = {name: domain for name, domain in space.items() if name not in placed and domain.when.keys() <= placed.keys()}
        if not ready:
            circle = ", ".join(name for name in space if name not in placed)
            raise ConfigError(f"tune.space: the conditions of {circle} go in a circle: remove one `when`")
        placed |= ready
    return placed


def _check_conditions(name: str, domain: Conditional, space: Space) -> None:
    for other, allowed in domain.conditions().items():
        if other not in space:
            raise ConfigError(f"tune.space: {name} is drawn when {other} has some value, and {other} is not in the space: add it there")
        for value in allowed:
            if not _holds(space[other], value):
                raise ConfigError(f"tune.space: {name} is drawn when {other} = {value!r}, a value that {other} never takes: correct `when`")


def _holds(domain: Domain, value: Any) -> bool:
    if isinstance(domain, Choice):
        return value in domain.values
    return isinstance(domain, Integer) and isinstance(value, int) and domain.low <= value <= domain.high


def check_searchable(config: TuneConfig, steps: int, *, carries_over: bool) -> None:
    """Raises ConfigError where searcher or scheduler cannot work with the space. steps: of a trial; carries_over: whether trials do so
    whatever is drawn."""
    if config.scheduler in POPULATION and config.space:
        _check_looks(config, steps)
    for name, domain in config.space.items():
        if config.searcher == "grid" and isinstance(domain, Uniform):
            raise ConfigError(
                f"tune.space: {name} has a continuous range ({domain.type}), and a grid has no end there: "
                "list its values as type = grid, or set tune.searcher = random"
            )
        if config.searcher != "grid" and domain.type == "grid":
            raise ConfigError(
                f"tune.space: {name} is of type grid, and tune.searcher = {config.searcher}: set tune.searcher = grid, or type = choice"
            )
        if config.scheduler in POPULATION:
            _check_mutable(name, domain, config)
            if name in BATCH_IN_PROMPTS and (carries_over or "ppo.carry_over" in config.space):
                raise ConfigError(
                    f"tune.space: {config.scheduler} copies checkpoints from trial to trial, and with ppo.carry_over one may carry more "
                    f"prompts over than a batch of the next trial has: leave {name} or ppo.carry_over out"
                )
    ordered(config.space)
    if config.searcher == "grid" and (points := len(grid(config.space))) > config.trials:
        raise ConfigError(f"tune.space: the grid has {points} points, and tune.trials = {config.trials}: set tune.trials = {points}")


def _check_looks(config: TuneConfig, steps: int) -> None:
    """Whether the population is looked at early enough for something to change: pb2 needs two looks to see what a value gains."""
    looks = 2 if config.scheduler == "pb2" else 1
    if looks * config.perturb_every >= steps:
        most = (steps - 1) // looks
        remedy = f"set tune.perturb_every = {most} or less" if most else f"set ppo.steps = {looks + 1} or more"
        raise ConfigError(
            f"tune.perturb_every = {config.perturb_every}: {config.scheduler} would change nothing before ppo.steps = {steps} end: {remedy}"
        )


def _check_mutable(name: str, domain: Domain, config: TuneConfig) -> None:
    if domain.when:
        raise ConfigError(f"tune.space: {config.scheduler} changes every key of the space, so {name} can have no `when`: leave it out")
    if any(f"{name}.".startswith(f"{fixed}.") for fixed in FIXED_IN_A_POPULATION):
        raise ConfigError(
            f"tune.space: {config.scheduler} copies checkpoints from trial to trial, which {name} would make unlike: leave it out"
        )
    if config.scheduler == "pb2" and isinstance(domain, Choice):
        raise ConfigError(f"tune.space: pb2 works on ranges, and {name} is of type {domain.type}: use uniform, loguniform or int, or pbt")


def points(config: TuneConfig, seed: int) -> list[dict[str, Any]]:
    """The configurations that a random or grid search begins with, in order; without pbt and pb2, all that it ever has."""
    if config.searcher == "grid":
        return grid(config.space)
    rng = random.Random(seed)
    return [draw(config.space, rng) for _ in range(config.trials)]


def sample(space: Space) -> list[dict[str, Any]]:
    """Some of what can be drawn, each only once."""
    rng = random.Random(0)
    drawn: list[dict[str, Any]] = []
    for values in (draw(space, rng) for _ in range(SAMPLE)):
        if values not in drawn:
            drawn.append(values)
    return drawn


def draw(space: Space, rng: random.Random) -> dict[str, Any]:
    """One configuration: key -> value of every key whose conditions hold."""
    values: dict[str, Any] = {}
    for name, domain in ordered(space).items():
        value = _draw(domain, rng)  # drawn also where it is not used: what follows does not depend on it
        if domain.allows(values):
            values[name] = value
    return values


def _draw(domain: Domain, rng: random.Random) -> Any:
    if isinstance(domain, Choice):
        return rng.choice(domain.values)
    if isinstance(domain, Integer):
        if not domain.log:
            return rng.randint(domain.low, domain.high)
        # the interval around each whole number, so that both ends are as likely as their neighbours
        return min(domain.high, max(domain.low, round(_log_uniform(domain.low - 0.5, domain.high + 0.5, rng))))
    return _log_uniform(domain.low, domain.high, rng) if domain.type == "loguniform" else rng.uniform(domain.low, domain.high)


def _log_uniform(low: float, high: float, rng: random.Random) -> float:
    return min(high, max(low, math.exp(rng.uniform(math.log(low), math.log(high)))))


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination, keys whose conditions do not hold left out; each only once."""
    points: list[dict[str, Any]] = [{}]
    for name, domain in ordered(space).items():
        points = list(itertools.chain.from_iterable(_extended(point, name, domain) for point in points))
    return points


def _extended(point: dict[str, Any], name: str, domain: Domain) -> Iterator[dict[str, Any]]:
    if not domain.allows(point):
        yield point
        return
    assert not isinstance(domain, Uniform), "check_searchable refuses it"
    for value in domain.values if isinstance(domain, Choice) else range(domain.low, domain.high + 1):
        yield {**point, name: value}


def suggest(space: Space, trial: Suggestions) -> dict[str, Any]:
    """The configuration that Optuna suggests, key by key."""
    values: dict[str, Any] = {}
    for name, domain in ordered(space).items():
        if not domain.allows(values):
            continue
        if isinstance(domain, Choice):
            values[name] = trial.suggest_categorical(name, list(domain.values))
        elif isinstance(domain, Integer):
            values[name] = trial.suggest_int(name, domain.low, domain.high, log=domain.log)
        else:
            values[name] = trial.suggest_float(name, domain.low, domain.high, log=domain.type == "loguniform")
    return values


def clipped(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with every number inside its range, whole where the domain is."""
    out = dict(values)
    for name, domain in space.items():
        if name in out and not isinstance(domain, Choice):
            number = round(out[name]) if isinstance(domain, Integer) else float(out[name])
            out[name] = min(domain.high, max(domain.low, number))
    return out


def corners(space: Space) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """For every key and each of its values, or both ends of its range: (key, the value with what its conditions ask for, the same with
    the first value of every other key that is then drawn)."""
    in_order = ordered(space)
    for name, domain in in_order.items():
        for value in domain.ends():
            alone = {**_needed(name, in_order), name: value}
            whole: dict[str, Any] = {}
            for other, other_domain in in_order.items():
                if other_domain.allows(whole):
                    whole[other] = alone.get(other, other_domain.ends()[0])
            yield name, alone, whole


def _needed(name: str, space: Space) -> dict[str, Any]:
    """The first value that each condition of a key allows, and what those keys need in turn."""
    needed: dict[str, Any] = {}
    for other, allowed in space[name].conditions().items():
        needed |= _needed(other, space) | {other: allowed[0]}
    return needed
