"""Hyperparameter search over PPO."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.schema import Config

POPULATION = ("pbt", "pb2")
"""Schedulers that change a trial's configuration on its way."""
BY_ANSWERS = ("held_out", "gold")
"""Objectives for which trials answer held-out prompts."""


class Conditional(Config):
    when: dict[str, Any] = Field(default_factory=dict)
    """Other keys of the space -> the value, or list of values, under which this key is drawn at all; otherwise it keeps the recipe's."""

    def allows(self, values: dict[str, Any]) -> bool:
        """Whether a configuration of the keys drawn so far, with those that are not drawn left out, asks for this key."""
        return all(name in values and values[name] in allowed for name, allowed in self.conditions().items())

    def conditions(self) -> dict[str, list[Any]]:
        return {name: list(allowed) if isinstance(allowed, list | tuple) else [allowed] for name, allowed in self.when.items()}


class Uniform(Conditional):
    """A real number, `high` included as good as never."""

    type: Literal["uniform", "loguniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _not_empty(self) -> Uniform:
        if not self.low < self.high or (self.type == "loguniform" and self.low <= 0):
            raise ValueError(f"empty range: low = {self.low}, high = {self.high}")
        return self

    def ends(self) -> tuple[Any, ...]:
        return self.low, self.high


class Integer(Conditional):
    """A whole number from `low` to `high`, both included; `log`: drawn uniformly in its logarithm."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False

    @model_validator(mode="after")
    def _not_empty(self) -> Integer:
        if self.low > self.high or (self.log and self.low < 1):
            raise ValueError(f"empty range: low = {self.low}, high = {self.high}")
        return self

    def ends(self) -> tuple[Any, ...]:
        return self.low, self.high


class Choice(Conditional):
    """One of the values; `grid` says that each is to be tried, which only the grid searcher does."""

    type: Literal["choice", "grid"]
    values: tuple[Any, ...] = Field(min_length=1)

    def ends(self) -> tuple[Any, ...]:
        return self.values


Domain = Annotated[Uniform | Integer | Choice, Field(discriminator="type")]


class TuneConfig(Config):
    """Trials of `corral tune`; every trial is one PPO run, all share one scoring service."""

    trials: int = Field(4, ge=1)
    """How many configurations to try; with pbt and pb2 the size of the population."""
    concurrent: int | Literal["auto"] = "auto"
    """Trials at a time; auto: as many as the cluster has room for beside the scoring service."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """How configurations are chosen: drawn from run.seed; every combination of the `choice`, `grid` and `int` domains; by Optuna's TPE
    from the results so far."""
    multi_objective: bool = False
    """With optuna: raise the score and lower the KL as two objectives. `best` is chosen by the objective all the same."""
    scheduler: Literal["none", "asha", "median", "pbt", "pb2"] = "asha"
    """What becomes of weak trials: nothing; stopped at rungs of steps unless among the best (asha), or when below the median of the
    others' running means; continued from a copy of a strong trial under changed values (pbt: perturbed, pb2: by a Gaussian process)."""
    space: dict[str, Domain] = Field(default_factory=dict)
    """Dotted config key -> domain, for example `"ppo.kl.coef" = {type = "loguniform", low = 0.01, high = 0.2}`; types: uniform,
    loguniform, int (with log = true or not), choice, grid. `when = {"ppo.algorithm.name" = "ppo"}` draws a key only under such values."""
    objective: Literal["training", "held_out", "gold", "hold_out"] = "training"
    """What a trial's score is: of its own rollouts; of answers to held-out prompts, by the main reward model or by the embedded task's
    gold judge; of its rollouts by the reward's held-out parts (hold_out = true)."""
    eval_every: int = Field(4, ge=1)
    """With held_out and gold: steps between evaluations; the first and the last step are evaluated too."""
    eval_prompts: int = Field(64, ge=2)
    """With held_out and gold: prompts per evaluation, the same for every trial, at most evaluation.prompts."""
    kl_price: float = Field(0.05, ge=0)
    """What a trial's objective pays per nat of KL to the reference, whatever its own ppo.kl.coef: mean score - kl_price x KL."""
    kl_budget: float | None = Field(None, gt=0)
    """Nats per sequence, mean over `window` steps, beyond which a trial is stopped and cannot be the best."""
    divergence: float | None = Field(3.0, gt=0)
    """A trial has diverged when its training score (mean over `window` steps) lies this many standard deviations of its first batch's
    scores below that batch's mean; null: never."""
    collapse: float | None = Field(0.2, gt=0, lt=1)
    """A trial has collapsed when its responses (mean over `window` steps) are shorter than this share of its first batch's; null: never."""
    window: int = Field(3, ge=1)
    """Objective, KL and length are averaged over this many last steps."""
    grace_steps: int = Field(4, ge=1)
    """ASHA and median: steps before a trial may be stopped."""
    reduction: int = Field(2, ge=2)
    """ASHA: one in `reduction` trials goes on past each rung."""
    perturb_every: int = Field(4, ge=1)
    """PBT and PB2: steps between two looks at the population."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """PBT and PB2: share of the population that is replaced, by copies out of the same share at the top."""
    save_every: int = Field(4, ge=1)
    """Steps between a trial's checkpoints; with pbt and pb2 `perturb_every` rules."""
    max_failures: int = Field(1, ge=0)
    """How often a trial that loses a process goes on from its own checkpoint before it counts as failed."""

    @model_validator(mode="after")
    def _parts_go_together(self) -> TuneConfig:
        if self.concurrent != "auto" and self.concurrent < 1:
            raise ValueError(f'concurrent = {self.concurrent}: set 1 or more, or "auto"')
        if self.multi_objective and self.searcher != "optuna":
            raise ValueError(f"multi_objective is for Optuna, and searcher = {self.searcher}: set tune.searcher = optuna")
        if self.scheduler in POPULATION:
            if self.searcher == "optuna":
                raise ValueError(f"scheduler = {self.scheduler} chooses values itself: set tune.searcher = random, or another scheduler")
            if self.concurrent != "auto" and self.concurrent < self.trials:
                raise ValueError(
                    f"scheduler = {self.scheduler} takes turns over all {self.trials} trials by what the cluster has room for: "
                    'set tune.concurrent = "auto"'
                )
            if self.trials < 2:
                raise ValueError(f"scheduler = {self.scheduler} compares trials, and trials = {self.trials}: set tune.trials to 2 or more")
        return self

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints of a trial."""
        return self.perturb_every if self.scheduler in POPULATION else self.save_every
