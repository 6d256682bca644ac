"""The road from a base model to a PPO model, in one run folder: every stage is done once, whatever is finished is taken as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.data.corpus import Corpus
from app.data.pretraining import NAME, write_pretraining
from app.models.load import seen_from_anywhere, writes_text
from app.models.trainable import check_trained_sections
from app.models.vocabulary import require_critic_vocabulary
from app.planning.placement import engines_load_early
from app.report import write_report
from app.run_folder import RunFolder
from app.run_layout import DATA, EXAMPLES_FILE, MODEL
from app.stages.evaluate import answer, compare, write_examples
from app.stages.interruption import raise_unserved
from app.stages.ppo import PromptSets, gold_of, open_pool, prompt_sets, train_ppo
from app.stages.preparation import prepare
from app.stages.reward_model import set_reward_offset, train_reward_model, training_replies
from app.stages.rewards import MAIN, StartScoring, served_reward_models
from app.stages.sft import train_sft
from app.tracking import RunTracker
from app.workers.memory import PeakMemory, raylet_pids
from app.workers.rollout_pool import VllmRolloutPool
from app.workers.shared_gpus import PlacedRecipe, shared_gpus

STAGES = ("sft", "rm", "ppo")


class Pipeline:
    """The stages of one run. A context manager: rollout engines stay up for all stages that need them, and end with it.

    A command may start in the middle: `model.path` other than the embedded model is then already the SFT model, and
    `reward.path` the reward model; the embedded model, which exists nowhere trained, goes through the earlier stages first.
    """

    def __init__(self, recipe: Recipe, run: RunFolder, corpus: Corpus, tracker: RunTracker) -> None:
        self.recipe, self.run, self.tracker = recipe, run, tracker
        self.prepared = prepare(recipe, run, corpus)
        self.parents: dict[str, str] = {"data": corpus.sha256}  # what the next stage comes from, by content hash
        self._open = ExitStack()
        self._pool: VllmRolloutPool | None = None
        self._placed = PlacedRecipe(recipe)  # of the engines that are open
        self._memory = PeakMemory(raylet_pids())

    def __enter__(self) -> Pipeline:
        self._memory.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()
        self._memory.__exit__(kind, error, trace)

    def check_trainable(self, command: str) -> None:
        """Raises ModelError that names the section, before anything is trained, where the model has not the layers that are to be frozen
        or adapted. Of a model that was on the hub nobody could say it earlier."""
        check_trained_sections(self.recipe, command, self.prepared.model_path)

    @cached_property
    def prompts(self) -> PromptSets:
        """Both sides of the corpus as prompts; SFT alone needs none."""
        return prompt_sets(self.recipe, self.prepared)

    def sft(self) -> str:
        """Fine-tune the base model; returns the folder of the SFT model."""
        return self._once("sft", lambda: train_sft(self.recipe, self.run, self.tracker, self.prepared))

    def sft_model(self) -> str:
        """The SFT model that later stages start from: the given one, or the embedded model after SFT."""
        return self.sft() if self.recipe.model.path == "embedded" else self.prepared.model_path

    def reward_model(self, sft_path: str) -> str:
        """Train the reward model and centre its scores on the SFT model's own answers; returns its folder.

        A model that writes none (an encoder, a reward model that is trained further) is centred on replies of its training data.
        """
        answers = writes_text(sft_path)

        def train() -> dict[str, Any]:
            if answers and engines_load_early(self.recipe):
                self.engines(sft_path)  # they load while the reward model trains
            results = train_reward_model(self.recipe, self.run, self.tracker, self.prepared, sft_path=sft_path)
            return results | {"reward_offset": self._centre(self.engines(sft_path) if answers else None)}

        return self._once("rm", train)

    def given_reward_model(self, sft_path: str) -> str:
        """`reward.path`, or the embedded task's reward model trained here."""
        given = self.recipe.reward.path
        if given is None:
            return self.reward_model(sft_path)
        path = seen_from_anywhere(given)
        if self.recipe.ppo.has_critic_model:
            require_critic_vocabulary(path, sft_path, trust_remote_code=self.recipe.model.trust_remote_code)
        return path

    def ppo(self, sft_path: str, reward_path: str, start_scoring: StartScoring) -> str:
        """PPO from the SFT model against the reward model; returns the folder of the PPO model."""

        def train() -> dict[str, Any]:
            pretraining = self.pretraining()
            pool = self.engines(sft_path)
            return train_ppo(
                self._placed.recipe,
                self.run,
                self.tracker,
                self.prepared.template,
                self.prompts,
                policy_path=sft_path,
                reward_path=reward_path,
                pool=pool,
                start_scoring=start_scoring,
                learner_placement=self._placed.learners,
                pretraining=pretraining,
            )

        return self._once("ppo", train)

    def pretraining(self) -> Path | None:
        """Token cache of the text that ppo.pretraining mixes in; None where it is off."""
        texts, template = self.prepared.corpus.pretraining, self.prepared.template
        return None if texts is None else write_pretraining(texts, template, self.recipe, self.run.path / DATA / NAME)

    def engines(self, sft_path: str) -> VllmRolloutPool:
        """The run's rollout engines, started with the SFT model; they may still be loading."""
        if self._pool is None:
            eos_id = self.prepared.template.eos_id
            self._placed = self._open.enter_context(shared_gpus(self.recipe))
            placed = self._placed
            pool = open_pool(placed.recipe, sft_path, self.prompts.all, eos_id, placed.engines, note=self.tracker.note)
            self._pool = self._open.enter_context(pool)
        return self._pool

    def close_engines(self) -> None:
        """End the rollout engines and give their resources back."""
        self._open.close()
        self._pool = None

    def summarise(self, **more: Any) -> dict[str, Any]:
        """Write `summary.json` and `report.html` from the finished stages; returns the summary."""
        finished = {stage: results for stage in STAGES if (results := self.run.results(stage)) is not None}
        seconds = {stage: float((self.run.manifest(stage) or {})["seconds"]) for stage in finished}
        summary: dict[str, Any] = {**finished, "seconds": seconds, "peak_memory": self._memory.peak_bytes, **more}
        self.run.write_summary(summary)
        write_report(self.run.path)
        return summary

    def _centre(self, pool: VllmRolloutPool | None) -> float:
        limit = self.recipe.rm.offset_samples
        if pool is None:
            self.tracker.note(f"rm: scoring the replies of {limit} training groups, whose mean becomes the zero of the reward")
            sequences = training_replies(self.run, limit)
        else:
            prompts = self.prompts.train.prompts[:limit]
            self.tracker.note(f"rm: scoring {len(prompts)} answers of the SFT model, whose mean becomes the zero of the reward")
            pool.ready()
            sequences = [rollout.sequence for rollout in pool.submit(prompts, seed=self.recipe.run.seed).result()]
        return set_reward_offset(
            self.run.stage("rm") / MODEL,
            sequences,
            self.recipe.rm.workers,
            deadline_seconds=self.recipe.run.deadline_seconds,
            trust_remote_code=self.recipe.model.trust_remote_code,
        )

    def _once(self, stage: str, train: Callable[[], Mapping[str, Any]]) -> str:
        """Do a stage and commit it, unless it is finished and came from what there is now; returns its model folder. Raises CheckpointError
        where it would go on from checkpoints of another model or other data."""
        manifest = self.run.manifest(stage)
        if manifest is None or manifest["parents"] != self.parents or self.run.finished(stage) is None:
            self.run.begin(stage, self.parents)
            self.parents[stage] = self.run.finish(stage, train(), self.parents)
            raise_unserved(f"stopped when {stage} was finished")
        else:
            self.tracker.note(f"{stage}: already finished, taken from {self.run.path / stage}")
            self.parents[stage] = manifest["sha256"]
        return str(self.run.path / stage / MODEL)


def run_sft(recipe: Recipe, run: RunFolder, corpus: Corpus, tracker: RunTracker) -> dict[str, Any]:
    """`corral sft`. Returns the summary."""
    with Pipeline(recipe, run, corpus, tracker) as pipeline:
        pipeline.check_trainable("sft")
        pipeline.sft()
        return pipeline.summarise()


def run_rm(recipe: Recipe, run: RunFolder, corpus: Corpus, tracker: RunTracker) -> dict[str, Any]:
    """`corral rm`. Returns the summary."""
    with Pipeline(recipe, run, corpus, tracker) as pipeline:
        pipeline.check_trainable("rm")
        pipeline.reward_model(pipeline.sft_model())
        return pipeline.summarise()


def run_ppo(recipe: Recipe, run: RunFolder, corpus: Corpus, tracker: RunTracker, start_scoring: StartScoring) -> dict[str, Any]:
    """`corral ppo`. Returns the summary."""
    with Pipeline(recipe, run, corpus, tracker) as pipeline:
        pipeline.check_trainable("ppo")
        sft_path = pipeline.sft_model()
        pipeline.ppo(sft_path, pipeline.given_reward_model(sft_path), start_scoring)
        return pipeline.summarise()


def run_pipeline(recipe: Recipe, run: RunFolder, corpus: Corpus, tracker: RunTracker, start_scoring: StartScoring) -> dict[str, Any]:
    """`corral pipeline`. Returns the summary."""
    with Pipeline(recipe, run, corpus, tracker) as pipeline:
        pipeline.check_trainable("pipeline")
        sft_path = pipeline.sft()
        pipeline.ppo(sft_path, pipeline.reward_model(sft_path), start_scoring)
        return pipeline.summarise()


def run_evaluation(recipe: Recipe, run: RunFolder, corpus: Corpus, tracker: RunTracker, start_scoring: StartScoring) -> dict[str, Any]:
    """`corral evaluate`: the comparison that ends PPO, again, with the recipe's `evaluation` settings. Returns the summary.

    It trains nothing. Raises CheckpointError where a model of the run folder is unfinished or has changed.
    """
    ppo_path = run.model("ppo")
    reward_path = seen_from_anywhere(recipe.reward.path) if recipe.reward.path else run.model("rm")
    with Pipeline(recipe, run, corpus, tracker) as pipeline:
        own_sft = recipe.model.path == "embedded" or (run.path / "sft").is_dir()
        sft_path = run.model("sft") if own_sft else pipeline.prepared.model_path
        held_out = pipeline.prompts.held_out
        gold, template, trust = gold_of(recipe), pipeline.prepared.template, recipe.model.trust_remote_code
        one_engine = with_values(recipe, {"rollout.transfer": "object_store"})  # it takes the second model's weights from their files
        with (
            open_pool(one_engine, sft_path, held_out, template.eos_id) as pool,
            served_reward_models([], reward_path, sft_path, template.decode, start_scoring, trust_remote_code=trust) as models,
        ):
            judge = models[MAIN]
            pool.ready()
            tracker.note(f"evaluate: the SFT model answers {len(held_out)} held-out prompts")
            before = answer(pool, judge, held_out, template, recipe.evaluation, gold)
            pool.load_folder(ppo_path, 1)
            tracker.note(f"evaluate: the PPO model answers the same {len(held_out)} prompts")
            after = answer(pool, judge, held_out, template, recipe.evaluation, gold)
        write_examples(run.path / EXAMPLES_FILE, held_out, before, after, recipe.evaluation.examples)
        return pipeline.summarise(evaluation=compare(before, after, recipe.evaluation))
