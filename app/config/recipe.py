"""The recipe: every section of every command in one tree, so that each knob lives in one place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from app.config.alarms import AlarmsConfig
from app.config.data import DataConfig
from app.config.evaluation import EvaluationConfig
from app.config.ppo import PpoConfig
from app.config.reward import RewardConfig
from app.config.rollout import RolloutConfig
from app.config.scoring import ScoringConfig
from app.config.serving import ServingConfig
from app.config.shared import ModelConfig, RunConfig
from app.config.tracking import TrackingConfig
from app.config.training import RewardModelConfig, SftConfig
from app.config.tune import TuneConfig
from app.schema import Config, merge


class Recipe(Config):
    """One run.

    `model.path` is what the command starts from: a base model for `sft` and `pipeline`, the SFT model for `rm`, `ppo` and `tune`."""

    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sft: SftConfig = SftConfig()
    rm: RewardModelConfig = RewardModelConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PpoConfig = PpoConfig()
    rollout: RolloutConfig = RolloutConfig()
    scoring: ScoringConfig = ScoringConfig()
    serving: ServingConfig = ServingConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tune: TuneConfig = TuneConfig()

    @model_validator(mode="before")
    @classmethod
    def _exact_defaults(cls, given: Any) -> Any:
        run = given.get("run") if isinstance(given, Mapping) else None
        exact = isinstance(run, Mapping) and run.get("determinism") == "exact"
        return merge({"ppo": {"score_pieces": 1}, "scoring": {"alone": True}}, given) if exact else given

    @model_validator(mode="after")
    def _exact_runs_share_nothing(self) -> Recipe:
        if self.run.determinism == "exact":
            for name, given, needed in (
                ("ppo.max_lag", self.ppo.max_lag, 0),
                ("ppo.score_pieces", self.ppo.score_pieces, 1),
                ("scoring.alone", self.scoring.alone, True),
                ("rollout.min_engines", self.rollout.min_engines, None),
            ):
                if given != needed:
                    raise ValueError(f'{name} = {given} is not for run.determinism = "exact": set {name} = {json.dumps(needed)}')
        return self

    @model_validator(mode="after")
    def _carried_over_responses_go_on(self) -> Recipe:
        if self.ppo.carry_over and self.rollout.in_flight != "keep":
            raise ValueError(
                f"ppo.carry_over = {self.ppo.carry_over:g} lets responses go on under new weights, and rollout.in_flight = "
                f'"{self.rollout.in_flight}" does not: set rollout.in_flight = "keep", or ppo.carry_over = 0'
            )
        return self

    @model_validator(mode="after")
    def _lag_has_engines_at_work(self) -> Recipe:
        lag, in_flight = self.ppo.max_lag, self.rollout.in_flight
        if lag and self.rollout.colocate:
            raise ValueError(
                f"ppo.max_lag = {lag} has the engines sample while the learner works, on the GPUs that rollout.colocate = true shares "
                "with it: set ppo.max_lag = 0, or rollout.colocate = false"
            )
        if not lag and in_flight != "keep":
            raise ValueError(
                f'rollout.in_flight = "{in_flight}" is about responses that are sampled while the learner works, and ppo.max_lag = 0 has '
                'none: set ppo.max_lag = 1 or more, or rollout.in_flight = "keep"'
            )
        return self

    @model_validator(mode="after")
    def _engines_hold_prompt_and_answer(self) -> Recipe:
        context, prompt, answer = self.rollout.max_model_len, self.data.max_prompt_length, self.rollout.max_new_tokens
        if context is not None and context < prompt + answer:
            raise ValueError(
                f"rollout.max_model_len = {context} is too short for a prompt of data.max_prompt_length = {prompt} tokens and an answer "
                f"of rollout.max_new_tokens = {answer}: raise it to {prompt + answer}, leave it out, or lower one of the two"
            )
        return self

    @model_validator(mode="after")
    def _reference_answers_have_the_room_of_answers(self) -> Recipe:
        whole, prompt, answer = self.data.max_length, self.data.max_prompt_length, self.rollout.max_new_tokens
        if self.ppo.reward.delta and whole < prompt + answer:
            raise ValueError(
                f"ppo.reward.delta compares answers of up to rollout.max_new_tokens = {answer} tokens with reference answers, for which "
                f"data.max_length = {whole} leaves {max(0, whole - prompt)} behind a prompt of data.max_prompt_length = {prompt}: set "
                f"data.max_length = {prompt + answer} or more, or lower one of the two"
            )
        return self

    @model_validator(mode="after")
    def _some_answers_end(self) -> Recipe:
        shaping = self.ppo.reward
        if self.rollout.ignore_eos and (shaping.missing_eos_score is not None or shaping.missing_eos_penalty):
            name = "missing_eos_penalty" if shaping.missing_eos_penalty else "missing_eos_score"
            off = 0 if shaping.missing_eos_penalty else '"null"'
            raise ValueError(
                f"rollout.ignore_eos = true samples every response to its token limit, and ppo.reward.{name} = "
                f"{getattr(shaping, name):g} is for those that run into it: set ppo.reward.{name} = {off}, or rollout.ignore_eos = false"
            )
        return self

    @model_validator(mode="after")
    def _ranks_have_a_gpu_each(self) -> Recipe:
        """Ray puts fractions that fit onto one GPU, and NCCL refuses two ranks of a group there."""
        beside = self.rollout.engines.gpus if self.rollout.shares_gpus else 0.0
        for name, workers, more in (("sft", self.sft.workers, 0.0), ("rm", self.rm.workers, 0.0), ("ppo", self.ppo.workers, beside)):
            key, share = f"{name}.workers.gpus = {workers.gpus:g}", workers.gpus + more
            if workers.gpus > 1:
                raise ValueError(f"{key}: a rank computes on one GPU: set {name}.workers.gpus = 1, and raise {name}.workers.count")
            if workers.gpus and workers.count > 1 and share <= 0.5:
                with_engine = f" and its engine {beside:g}" if more else ""
                raise ValueError(
                    f"{key}{with_engine}: {workers.count} ranks would come onto one GPU, where NCCL does not let them meet: set "
                    f"{name}.workers.gpus = 1, or {name}.workers.count = 1"
                )
        return self

    @model_validator(mode="after")
    def _precision_can_be_trained_in(self) -> Recipe:
        for name, section in (("sft", self.sft), ("rm", self.rm), ("ppo", self.ppo)):
            section.deepspeed.require_precision(self.model.precision, f"{name}.deepspeed")
        return self

    @model_validator(mode="after")
    def _overlong_buffer_fits(self) -> Recipe:
        buffer, limit = self.ppo.reward.overlong_buffer, self.rollout.max_new_tokens
        if buffer is not None and buffer > limit:
            raise ValueError(
                f"ppo.reward.overlong_buffer = {buffer} is longer than rollout.max_new_tokens = {limit}: "
                f"choose a part of it, such as {max(1, limit // 4)}"
            )
        return self
