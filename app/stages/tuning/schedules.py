"""Ray Tune's schedulers, with what they need to go on after the search was killed: Tune itself saves nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from ray.tune.schedulers.pb2 import PB2

from app.config.recipe import Recipe
from app.config.search_space import Space, clipped
from app.config.tune import Choice, Domain, Integer, TuneConfig
from app.stages.tuning.records import VALUES, trial_name

TIME, METRIC, MODE = "step", "target", "max"

Past = Mapping[str, Sequence[Mapping[str, Any]]]
"""Trial -> its reports in earlier lives of the search, by step."""
Perturbed = Callable[[Mapping[str, Any]], None]


class Asha(AsyncHyperBandScheduler):
    """ASHA that knows the rungs that trials have passed before."""

    past: Past = MappingProxyType({})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for result in self.past.get(trial_name(trial.trial_id), ()):
            self.on_trial_result(tune_controller, trial, dict(result))  # records it; what it decided then, it decided then


class Median(MedianStoppingRule):
    """Median stopping that knows the curves of trials that have run before."""

    past: Past = MappingProxyType({})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        past = self.past.get(trial_name(trial.trial_id), ())
        if past and trial not in self._results:  # an empty curve is none
            self._results[trial] = [dict(result) for result in past]


class _Population:
    """A population that tells what it changes, and whose members do not look at each other anew because the search was started again."""

    perturbed: Perturbed

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]
        if trial.last_result and TIME in trial.last_result:
            state, step = self._trial_state[trial], trial.last_result[TIME]  # type: ignore[attr-defined]
            state.last_score = trial.last_result[METRIC]
            state.last_perturbation_time = step - step % self._perturbation_interval  # type: ignore[attr-defined]

    def _log_config_on_step(self, trial_state: Any, new_state: Any, trial: Any, trial_to_clone: Any, new_config: Mapping[str, Any]) -> None:
        self.perturbed(
            {
                "trial": trial_name(trial.trial_id),
                "copied": trial_name(trial_to_clone.trial_id),
                "step": new_state.last_perturbation_time,
                "before": dict(trial_to_clone.config[VALUES]),
                "after": dict(new_config[VALUES]),
                "scores": [trial_state.last_score, new_state.last_score],
            }
        )


class Pbt(_Population, PopulationBasedTraining):
    """Population-based training."""


class Pb2(_Population, PB2):
    """Population-based bandits."""


def scheduler(recipe: Recipe, past: Past, perturbed: Perturbed) -> TrialScheduler:
    """What becomes of weak trials. past: reports of trials from before the search was started again."""
    config = recipe.tune
    grace = min(config.grace_steps, recipe.ppo.steps)
    if config.scheduler == "none":
        return FIFOScheduler()
    if config.scheduler == "asha":
        asha = Asha(TIME, METRIC, MODE, max_t=recipe.ppo.steps, grace_period=grace, reduction_factor=config.reduction)
        asha.past = past
        return asha
    if config.scheduler == "median":
        median = Median(TIME, METRIC, MODE, grace_period=grace)
        median.past = past
        return median
    population = _population(config)
    population.perturbed = perturbed
    return population


def _population(config: TuneConfig) -> Pbt | Pb2:
    def inside(changed: dict[str, Any]) -> dict[str, Any]:
        return {**changed, VALUES: clipped(config.space, changed[VALUES])}

    shared = {
        "time_attr": TIME,
        "metric": METRIC,
        "mode": MODE,
        "perturbation_interval": config.perturb_every,
        "quantile_fraction": config.quantile,
        "custom_explore_fn": inside,
    }
    if config.scheduler == "pbt":
        return Pbt(hyperparam_mutations={VALUES: {name: _mutation(domain) for name, domain in config.space.items()}}, **shared)
    return Pb2(hyperparam_bounds={VALUES: bounds(config.space)}, **shared)


def _mutation(domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return list(domain.values)
    if isinstance(domain, Integer):
        return (tune.lograndint if domain.log else tune.randint)(domain.low, domain.high + 1)
    return (tune.loguniform if domain.type == "loguniform" else tune.uniform)(domain.low, domain.high)


def bounds(space: Space) -> dict[str, list[float]]:
    """Key -> [low, high]."""
    return {name: [domain.low, domain.high] for name, domain in space.items() if not isinstance(domain, Choice)}
