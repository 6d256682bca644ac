"""The PPO stage: its loop, algorithm, rewards and learner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, create_model, field_validator, model_validator

from app.algorithms import ALGORITHMS
from app.algorithms.algorithm import Algorithm, KlPlace
from app.algorithms.kl_penalty import KlConfig
from app.algorithms.shaping import RewardShapingConfig
from app.algorithms.surrogate import Surrogate, SurrogateConfig
from app.config.pretraining import PretrainingConfig
from app.config.shared import AdapterConfig, DeepSpeedConfig, OptimizerConfig, WorkersConfig, require_one_way
from app.schema import Config

ALGORITHM, CRITIC = "ppo.algorithm.name", "ppo.critic_model"


class Unread(NamedTuple):
    """Why a key is not read, and the choice that leaves it so; or_choice: another one that could have it read."""

    reason: str
    choice: str
    value: str
    or_choice: str | None = None


class ChosenAlgorithm(SurrogateConfig):
    """Which algorithm, and the policy loss that all share. Its own options stand in the section of its name."""

    name: str = Field("ppo", description=f"Algorithm: {', '.join(ALGORITHMS)}.")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ALGORITHMS:
            raise ValueError(f"no such algorithm: choose one of {', '.join(ALGORITHMS)}")
        return name


if TYPE_CHECKING:
    AlgorithmConfig = ChosenAlgorithm
else:  # a section for every entry of ALGORITHMS, so that a new one needs no line here
    AlgorithmConfig = create_model(
        "AlgorithmConfig",
        __base__=ChosenAlgorithm,
        __module__=__name__,
        __doc__=ChosenAlgorithm.__doc__,
        **{name: (algorithm.options, algorithm.options()) for name, algorithm in ALGORITHMS.items()},
    )


class PolicyAdapterConfig(AdapterConfig):
    """Low-rank adapters (LoRA) of the policy: a push to the rollout engines carries them alone, the exported model has them merged."""

    embeddings: bool = False
    """Train the token embeddings and the output head as well; every push then carries them too."""

    @model_validator(mode="after")
    def _nothing_drops_out(self) -> PolicyAdapterConfig:
        if self.dropout:
            raise ValueError(
                f"ppo.lora.dropout = {self.dropout} trains another policy than the one that sampled, which makes every importance "
                "ratio wrong: set ppo.lora.dropout = 0"
            )
        return self


class PpoConfig(Config):
    """The actor-learner loop."""

    steps: int = Field(100, ge=1)
    """Loop iterations: one batch of rollouts, one update, one weight push each."""
    batch_size: int = Field(64, ge=1)
    """Rollouts per step, over all prompts."""
    samples_per_prompt: int = Field(1, ge=1)
    """Rollouts of each prompt; batch_size / samples_per_prompt prompts make a step. grpo and rloo compare them and need 2 or more."""
    epochs: int = Field(4, ge=1)
    """Passes over each batch of rollouts."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass."""
    micro_batch_size: int = Field(16, ge=1)
    """Rollouts per forward pass on one learner worker."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens per forward pass on one learner worker, prompts counted for each sample; given, it rules instead of `micro_batch_size`. Each
    optimizer step then takes as few passes as that allows. A longer rollout goes alone."""
    packing: bool = True
    """Compute the rollouts of a forward pass behind each other in one row, without padding, each attending to itself alone; what several
    of them begin with, such as the prompt of all its samples, once. Models whose layers need more than a causal mask are computed with
    padding all the same."""
    reuse_forward: bool = False
    """With one optimizer step per batch: learn from the forward pass that computed the proximal log-probs and values, instead
    of running it again. Saves a quarter of the learner's work and holds the activations of all its micro-batches at once."""
    max_lag: int = Field(0, ge=0)
    """How many policy versions old a rollout may be when it is trained on; 0 is synchronous PPO. From 1 on the next batch is sampled, and
    judged by reward model and reference, while the learner learns."""
    carry_over: float = Field(0.0, ge=0, lt=1)
    """Share of a batch that may be left unfinished when the batch closes (0: it waits for its longest response). These prompts go on being
    answered and belong to the next batch, each trained on once. They are a version older there, so one version of ppo.max_lag is theirs:
    max_lag = 2 samples as far ahead as 1 does without. Biased in its order alone: the first batch lacks the longest responses, the
    last one has more of them."""
    score_pieces: int = Field(4, ge=1)
    """A batch goes to reward model and reference in up to this many pieces, each as soon as its responses have ended; 1 waits for
    the whole batch."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    kl: KlConfig = KlConfig()
    reward: RewardShapingConfig = RewardShapingConfig()
    policy: OptimizerConfig = OptimizerConfig(lr=3e-6, eps=1e-5)
    critic: OptimizerConfig = OptimizerConfig(lr=3e-6, eps=1e-5)
    critic_model: Literal["reward_model", "value_head"] = "reward_model"
    """Where values come from: a model of its own that starts as the reward model and is trained as ppo.critic says; or a head on the
    policy's trunk (MLP, starts at 0), trained with the policy as ppo.policy says: algorithm.ppo.value_coef then weighs one against the
    other."""
    critic_warmup_steps: int = Field(0, ge=0)
    """First steps in which the critic learns alone, from answers of the policy as it is."""
    pretraining: PretrainingConfig = PretrainingConfig()
    freeze_layers: int = Field(0, ge=0)
    """Freeze the embeddings of the policy and this many layers above them; the critic trains whole."""
    lora: PolicyAdapterConfig | None = None
    """Train low-rank adapters of the policy instead of its weights; they want a higher `policy.lr`, such as 1e-4. The critic trains
    whole."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    workers: WorkersConfig = WorkersConfig()
    max_logprob_mismatch: float = Field(1e-3, gt=0)
    """Largest |log p(engine) - log p(learner)| allowed on canaries after a push and, at lag 0, on rollouts; and the largest
    |current - proximal| at the first optimizer step of a batch, where both come from the same weights."""
    max_failed_scores: float = Field(0.1, ge=0, lt=1)
    """Share of a batch whose scores may fail after all retries (they are masked out, never 0) before the run stops."""
    save_every: int = Field(50, ge=1)
    """Steps between checkpoints: what is done again where a learner process is lost."""
    max_restarts: int = Field(3, ge=0)
    """Times that the learner may lose a process and start anew from the last checkpoint before the run stops."""
    keep_rollouts: int = Field(20, ge=0)
    """Latest steps whose rollouts stay in `DIR/ppo/rollouts` (parquet), where `corral replay` reads them; 0 keeps none."""

    @model_validator(mode="after")
    def _batch_divides(self) -> PpoConfig:
        unit = self.minibatches * self.workers.count
        if self.batch_size % unit:
            raise ValueError(
                f"ppo.batch_size = {self.batch_size} is no multiple of minibatches x workers.count = "
                f"{self.minibatches} x {self.workers.count}: choose a multiple of {unit}"
            )
        rows = self.batch_size // unit
        if not self.micro_batch_tokens and rows % self.micro_batch_size and rows > self.micro_batch_size:
            raise ValueError(
                f"each worker gets {rows} rollouts per minibatch, no multiple of ppo.micro_batch_size = "
                f"{self.micro_batch_size}: choose a divisor of {rows}"
            )
        require_one_way(self)
        return self

    @model_validator(mode="after")
    def _algorithm_gets_what_it_reads(self) -> PpoConfig:
        name, samples = self.algorithm.name, self.samples_per_prompt
        if self.batch_size % samples:
            raise ValueError(
                f"ppo.batch_size = {self.batch_size} is no multiple of ppo.samples_per_prompt = {samples}: "
                f"choose {max(1, self.batch_size // samples) * samples}, or another number of samples"
            )
        if self.make_algorithm().compares_samples and samples < 2:
            raise ValueError(
                f"ppo.algorithm.name = {name} compares the samples of a prompt, and ppo.samples_per_prompt = {samples} leaves nothing to "
                "compare: set ppo.samples_per_prompt to 2 or more, such as 8"
            )
        if self.max_lag and self.algorithm.max_importance is None:
            raise ValueError(
                f"ppo.max_lag = {self.max_lag} trains on samples of older policies, and ppo.algorithm.max_importance = null does not "
                "correct for that: set ppo.algorithm.max_importance = 2.0, or ppo.max_lag = 0"
            )
        return self

    @model_validator(mode="after")
    def _penalty_stays_above_zero(self) -> PpoConfig:
        if self.kl.target is not None and self.batch_size >= 5 * self.kl.horizon:
            raise ValueError(
                f"ppo.kl.horizon = {self.kl.horizon:g} is so short that one batch of ppo.batch_size = {self.batch_size} could make an "
                f"adaptive ppo.kl.coef 0 or negative: set ppo.kl.horizon = {self.batch_size} or more"
            )
        return self

    @model_validator(mode="after")
    def _carried_over_prompts_are_older(self) -> PpoConfig:
        if self.carry_over and not self.max_lag:
            raise ValueError(
                f"ppo.carry_over = {self.carry_over:g} trains on responses that older policies began, and ppo.max_lag = 0 allows none: "
                "set ppo.max_lag = 1 or more, or ppo.carry_over = 0"
            )
        if self.carry_over and not self.prompts_carried_over:
            prompts = self.batch_size // self.samples_per_prompt
            raise ValueError(
                f"ppo.carry_over = {self.carry_over:g} is less than one of the {prompts} prompts of a batch: "
                + (f"set ppo.carry_over = {1 / prompts:.2g} or more" if prompts > 1 else "set ppo.carry_over = 0")
            )
        return self

    @model_validator(mode="after")
    def _reused_forward_is_current(self) -> PpoConfig:
        if self.reuse_forward and self.epochs * self.minibatches > 1:
            raise ValueError(
                f"ppo.reuse_forward needs epochs = minibatches = 1, here {self.epochs} x {self.minibatches}: "
                "from the second optimizer step on the weights have moved; set ppo.reuse_forward = false"
            )
        if self.reuse_forward and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "ppo.reuse_forward holds several forward passes open, between which ZeRO 3 gives the parameters back: "
                "set ppo.reuse_forward = false or ppo.deepspeed.zero_stage = 2"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_moves_the_critic_alone(self) -> PpoConfig:
        warmup = self.critic_warmup_steps
        if warmup and not ALGORITHMS[self.algorithm.name].has_critic:
            raise ValueError(
                f"ppo.critic_warmup_steps = {warmup} trains a critic, and {self.algorithm.name} has none: set ppo.critic_warmup_steps = 0"
            )
        if warmup >= self.steps:
            raise ValueError(
                f"ppo.critic_warmup_steps = {warmup} leaves none of ppo.steps = {self.steps} to the policy: lower it, or raise ppo.steps"
            )
        if warmup and self.critic_model == "value_head" and self.policy.weight_decay:
            raise ValueError(
                f"ppo.policy.weight_decay = {self.policy.weight_decay:g} would shrink the policy while its value head learns alone: "
                "set ppo.policy.weight_decay = 0, or ppo.critic_warmup_steps = 0"
            )
        return self

    @model_validator(mode="after")
    def _pretraining_divides(self) -> PpoConfig:
        mix, workers = self.pretraining, self.workers.count
        unit = workers if self.micro_batch_tokens else workers * min(mix.micro_batch_size, max(1, mix.batch_size // workers))
        if mix.coef and mix.batch_size % unit:
            raise ValueError(
                f"ppo.pretraining.batch_size = {mix.batch_size} is no multiple of its micro_batch_size x workers.count = "
                f"{unit // workers} x {workers}: choose a multiple of {unit}"
            )
        return self

    def make_algorithm(self) -> Algorithm[Any]:
        """The chosen algorithm, with its options and the loss that this section asks for."""
        algorithm, place = ALGORITHMS[self.algorithm.name], self._kl_place
        surrogate = Surrogate(
            config=SurrogateConfig(**self.algorithm.model_dump(include=set(SurrogateConfig.model_fields))),
            max_lag=self.max_lag,
            kl_in_reward=place in ("reward", "both"),
            kl_in_loss=self.kl.loss_form if place in ("loss", "both") else None,
        )
        return algorithm(getattr(self.algorithm, self.algorithm.name), surrogate)

    def unread(self) -> dict[str, Unread]:
        """Keys and sections that nothing reads, each with the reason."""
        chosen = self.algorithm.name
        found = {f"ppo.algorithm.{name}": Unread(f"it belongs to {name}", ALGORITHM, chosen) for name in ALGORITHMS if name != chosen}
        if not ALGORITHMS[chosen].has_critic:
            found |= dict.fromkeys(("ppo.critic", "ppo.critic_model"), Unread(f"{chosen} trains no critic", ALGORITHM, chosen))
        elif self.critic_model == "value_head":
            found["ppo.critic"] = Unread("ppo.policy is what trains a value head", CRITIC, self.critic_model)
        if self._kl_place == "reward":
            found["ppo.kl.loss_form"] = Unread("the penalty stands in the reward alone", "ppo.kl.place", "reward", ALGORITHM)
        if self.kl.controller == "fixed":
            found["ppo.kl.horizon"] = Unread("the penalty's weight stays as it is", "ppo.kl.controller", "fixed")
        if self.reward.overlong_buffer is None:
            found["ppo.reward.overlong_penalty"] = Unread("there are no tokens to rise over", "ppo.reward.overlong_buffer", "null")
        return found

    @property
    def _kl_place(self) -> KlPlace:
        return self.kl.place or ALGORITHMS[self.algorithm.name].usual_kl_place

    @property
    def has_critic_model(self) -> bool:
        """Whether the learner holds a second model."""
        return ALGORITHMS[self.algorithm.name].has_critic and self.critic_model == "reward_model"

    @property
    def has_value_head(self) -> bool:
        """Whether values come from the policy's trunk."""
        return ALGORITHMS[self.algorithm.name].has_critic and self.critic_model == "value_head"

    def policy_learns(self, step: int) -> bool:
        """Whether the policy moves in this step of the loop (from 0), or its critic alone."""
        return step >= self.critic_warmup_steps

    def optimizer_steps(self, *, of_policy: bool) -> int:
        """Of the whole run: of the critic's optimizer, or of the policy's, which rests during the warm-up unless a value head shares it."""
        rests = self.critic_warmup_steps if of_policy and not self.has_value_head else 0
        return (self.steps - rests) * self.epochs * self.minibatches

    def doubts(self) -> list[str]:
        """What is allowed and yet hardly meant."""
        trained = [("ppo.policy", self.policy, True)] + ([("ppo.critic", self.critic, False)] if self.has_critic_model else [])
        told = [optimizer.doubt(key, self.optimizer_steps(of_policy=of_policy)) for key, optimizer, of_policy in trained]
        return [text for text in told if text is not None]

    @property
    def prompts_carried_over(self) -> int:
        """Prompts that a batch leaves to the next one."""
        prompts = self.batch_size // self.samples_per_prompt
        return min(round(self.carry_over * prompts), prompts - 1)

    @property
    def rows_per_step(self) -> int:
        """Rollouts of one minibatch on one worker."""
        return self.batch_size // (self.minibatches * self.workers.count)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on each worker; at most, where tokens are counted."""
        if self.micro_batch_tokens:
            return self.rows_per_step
        return max(1, self.rows_per_step // self.micro_batch_size)
