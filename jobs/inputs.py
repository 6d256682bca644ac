"""Checks of what a recipe points at, before Ray starts and before a model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from app.config.recipe import Recipe
from app.config.shared import BUILT_IN_MODELS
from app.data.corpus import Corpus, load_corpus, require_groups, require_prompts, require_references, require_threads
from app.data.pretraining import NAME as PRETRAINING
from app.data.pretraining import load_pretraining
from app.data.reading import EMBEDDED
from app.data.registry import Stage, complete, lookup
from app.data.source import is_hub_name, local_files
from app.errors import ConfigError, CorralError, ModelError
from app.models.context import context_of, require_context
from app.planning.memory import WIDTHS
from app.planning.shapes import cache_bytes, stored_json
from app.rewards.part import RulePart
from app.rewards.reward_model import RewardModelPart
from app.run_folder import RunFolder
from app.run_layout import DATA, MODEL
from jobs.trained_layers import check_trained_layers

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
ENGINE_COMMANDS = ("ppo", "tune", "pipeline", "evaluate")


def check_inputs(recipe: Recipe, command: str) -> None:
    """Whether data, model and reward model are there. Raises DataError, ModelError or ConfigError; asks no hub."""
    _check_data(recipe, command)
    if command == "tune" and (recipe.ppo.workers.labels or recipe.rollout.engines.labels):
        raise ConfigError("ppo.workers.labels and rollout.engines.labels have no effect inside a trial's placement group: leave them out")
    _check_colocation(recipe, command)
    _check_transfer(recipe, command)
    if recipe.model.path != "embedded":
        _check_model(recipe.model.path, trained=command not in BASE_MODEL_COMMANDS, writes=command != "rm")
    check_trained_layers(recipe, command)
    _check_lengths(recipe, command)
    _check_cache(recipe, command)
    if command in MIX_COMMANDS:
        _check_reward_parts(recipe)
    if command == "evaluate" and recipe.run.storage is None:  # else the model may still be there only
        _check_run_has_ppo_model(Path(recipe.run.dir))
    if recipe.reward.path is not None:
        try:
            _check_reward_model(recipe.reward.path)
        except ModelError as error:
            raise ModelError(f"reward.path: {error}") from error
        if command in CRITIC_COMMANDS and recipe.ppo.has_critic_model:
            _check_critic(recipe, recipe.reward.path)
    elif command in REWARD_COMMANDS and not _finds_own_reward_model(recipe, command):
        raise ConfigError(
            f"reward.path is not set and `corral {command}` needs a reward model: "
            "give the folder that `corral rm` or `corral pipeline` left as DIR/rm/model"
        )
    _check_scorers(recipe, command)
    if command == "tune":
        _check_search(recipe)


def doubts(recipe: Recipe, command: str) -> list[str]:
    """What is allowed and yet hardly meant, to be told before hours are spent on it."""
    return recipe.ppo.doubts() if command in MIX_COMMANDS else []


def _scorers(recipe: Recipe, command: str) -> Iterator[tuple[str, str]]:
    """(key, path) of every given reward model that scores what the policy writes."""
    if command in REWARD_COMMANDS and recipe.reward.path is not None:
        yield "reward.path", recipe.reward.path
    if command in MIX_COMMANDS:
        for name, part in recipe.reward.parts.items():
            if isinstance(part, RewardModelPart):
                yield from ((f"reward.parts.{name}.paths", path) for path in part.paths)


def _check_scorers(recipe: Recipe, command: str) -> None:
    """Whether reward models can read what the policy writes: its token ids, or where they have a tokenizer of their own the text. Local
    folders; others are looked at when they are there."""
    trust = recipe.model.trust_remote_code
    for key, path in _scorers(recipe, command):
        if _both_are_here(recipe.model.path, path):
            from app.models.replies import ReplyEncoder
            from app.models.vocabulary import other_vocabulary

            if other_vocabulary(path, recipe.model.path, trust_remote_code=trust):
                try:
                    ReplyEncoder.of(path, trust_remote_code=trust)
                except ModelError as error:
                    raise ModelError(f"{key} = {path}, which has another tokenizer than the policy and so reads text: {error}") from error
                continue
        require_context(context_of(path), *_longest(recipe), f"{key} = {path}")
        if _scores_references(recipe, command):
            answers = "data.max_length (of reference answers, for ppo.reward.delta)"
            require_context(context_of(path), recipe.data.max_length, answers, f"{key} = {path}")


def _check_search(recipe: Recipe) -> None:
    """Whether there is something to search, and the objective is to be had. `load_recipe` has checked the space itself."""
    config = recipe.tune
    if not config.space:
        raise ConfigError(
            'tune.space is empty: name at least one key, such as "ppo.kl.coef" = {type = "loguniform", low = 0.01, high = 0.2}'
        )
    if config.objective == "gold" and recipe.data.path != EMBEDDED:
        raise ConfigError("tune.objective = gold asks the embedded task's own judge, and data.path is other data: set it to held_out")
    if config.objective == "hold_out" and not any(part.hold_out for part in recipe.reward.parts.values()):
        raise ConfigError(
            "tune.objective = hold_out reads the held-out parts of the reward, and reward.parts has none: "
            "give one part hold_out = true, or set tune.objective = held_out"
        )
    if config.scheduler == "pb2" and importlib.util.find_spec("sklearn") is None:
        raise ConfigError("tune.scheduler = pb2 needs the package scikit-learn: pip install scikit-learn, or choose tune.scheduler = pbt")


def _check_reward_parts(recipe: Recipe) -> None:
    """Whether every reward model of the mix is there, and every rule works. Raises ModelError or ConfigError that names the part."""
    for name, part in recipe.reward.parts.items():
        try:
            if isinstance(part, RewardModelPart):
                for path in part.paths:
                    _check_reward_model(path)
            elif isinstance(part, RulePart):
                part.check()
        except CorralError as error:
            raise type(error)(f"reward.parts.{name}: {error}") from error


def _check_data(recipe: Recipe, command: str) -> None:
    """Whether every set is known, for the stage, and every local source there."""
    for name, source in recipe.data.sets.items():
        if source.path is None and command in STAGE_OF:
            lookup(name, STAGE_OF[command])
    for name, source in complete(recipe.data).sources().items():
        _check_source(f"data.sets.{name}.path" if name in recipe.data.sets else "data.path", source.path)
    if _mixes_pretraining(recipe, command):
        _check_source("ppo.pretraining.path", recipe.ppo.pretraining.path)


def _mixes_pretraining(recipe: Recipe, command: str) -> bool:
    """Whether some learner of the command reads ppo.pretraining."""
    searched = command == "tune" and "ppo.pretraining.coef" in recipe.tune.space
    return command in MIX_COMMANDS and bool(recipe.ppo.pretraining.coef or searched)


def _scores_references(recipe: Recipe, command: str) -> bool:
    """Whether some run of the command has reference answers scored."""
    searched = command == "tune" and "ppo.reward.delta" in recipe.tune.space and True in recipe.tune.space["ppo.reward.delta"].ends()
    return command in MIX_COMMANDS and (recipe.ppo.reward.delta or searched)


def _check_source(key: str, path: str | None) -> None:
    if path not in (None, EMBEDDED) and "://" not in path and not is_hub_name(path):
        local_files(path, key)


def _check_lengths(recipe: Recipe, command: str) -> None:
    """Whether sequences fit the models, where that is known without asking a hub."""
    context = context_of(recipe.model.path)
    if command in SEQUENCE_COMMANDS or _mixes_pretraining(recipe, command):
        require_context(context, recipe.data.max_length, "data.max_length")
    if command != "sft":
        require_context(context, *_longest(recipe))
        if recipe.rollout.max_model_len is not None:
            require_context(context, recipe.rollout.max_model_len, "rollout.max_model_len")


def _check_cache(recipe: Recipe, command: str) -> None:
    """Whether an engine's KV cache holds the longest sequence, where the model's folder is here; vLLM would say it a minute later."""
    file, rollout = Path(recipe.model.path).expanduser() / "config.json", recipe.rollout
    if command not in ENGINE_COMMANDS or rollout.engines.gpus or not file.is_file():
        return
    tokens = rollout.max_model_len or _longest(recipe)[0]
    needed = cache_bytes(stored_json(file), tokens, WIDTHS[recipe.model.precision])
    if needed > rollout.kv_cache_gib * 2**30:
        raise ConfigError(
            f"rollout.kv_cache_gib = {rollout.kv_cache_gib:g}: prompt and answer of {tokens} tokens need {needed / 2**30:.2g} GiB of it: "
            "raise it, or lower data.max_prompt_length or rollout.max_new_tokens"
        )


def _longest(recipe: Recipe) -> tuple[int, str]:
    """Tokens of prompt and answer together, and the keys that say so."""
    return recipe.data.max_prompt_length + recipe.rollout.max_new_tokens, "data.max_prompt_length + rollout.max_new_tokens"


def _check_colocation(recipe: Recipe, command: str) -> None:
    """Engine k sits on the GPU of learner k, so it needs one, and no other."""
    learners, engines = recipe.ppo.workers, recipe.rollout.engines
    if not recipe.rollout.shares_gpus:
        return
    if command == "tune":
        raise ConfigError(
            "rollout.colocate = true: the engines of a trial have GPUs of their own in its placement group: set rollout.colocate = false, "
            'and leave rollout.transfer = "ipc" out'
        )
    if engines.count > learners.count or not 0 < learners.gpus <= 1 or engines.gpus > 1:
        raise ConfigError(
            f"rollout.colocate puts engine k on the one GPU of learner k, here {engines.count} engines x {engines.gpus:g} GPUs on "
            f"{learners.count} learners x {learners.gpus:g}: set rollout.engines.count <= ppo.workers.count and at most 1 GPU each"
        )


def _check_transfer(recipe: Recipe, command: str) -> None:
    """Whether the learner can send weights the way that the engines get them."""
    if command in MIX_COMMANDS and recipe.rollout.chosen_transfer == "nccl" and not recipe.ppo.workers.gpus:
        raise ConfigError(
            f"weights go over NCCL to engines of rollout.engines.gpus = {recipe.rollout.engines.gpus:g}, and ppo.workers.gpus = 0 leaves "
            'the learner no GPU to send from: set ppo.workers.gpus = 1, or rollout.transfer = "object_store"'
        )


def _finds_own_reward_model(recipe: Recipe, command: str) -> bool:
    """PPO and Tune train one for the embedded model; an evaluation takes the one of its run folder."""
    if command == "evaluate":
        return recipe.run.storage is not None or (Path(recipe.run.dir) / "rm" / MODEL).is_dir()
    return recipe.model.path == "embedded"


def _check_run_has_ppo_model(folder: Path) -> None:
    if not (folder / "ppo" / MODEL).is_dir():
        raise ConfigError(f"{folder / 'ppo' / MODEL}: no PPO model there; run `corral pipeline` or `corral ppo` with this --run.dir first")


def _check_model(path: str, *, trained: bool, writes: bool) -> None:
    """`trained`: needs a chat template where it writes text; `writes`: needs to be a language model."""
    if path in BUILT_IN_MODELS or path.endswith(".gguf"):
        from app.models.load import check_convertible

        check_convertible(path)
        return
    # loads transformers, which the built-in models do not need yet
    from app.models.load import check_model_folder, writes_text

    check_model_folder(path, chat_template=False)
    language_model = not Path(path).expanduser().is_dir() or writes_text(Path(path).expanduser())  # the hub is not asked
    if writes and not language_model:
        raise ModelError(f"model.path = {path}: a reward model or an encoder writes no answers; name a causal language model")
    check_model_folder(path, chat_template=trained and language_model)


def _check_reward_model(path: str) -> None:
    from app.models.load import check_model_folder, has_output_head

    scores_nothing = path in BUILT_IN_MODELS or path.endswith(".gguf")
    if not scores_nothing:
        check_model_folder(path, chat_template=False)
        scores_nothing = Path(path).expanduser().is_dir() and has_output_head(path)
    if scores_nothing:
        raise ModelError(f"model {path}: a language model scores nothing; give the folder that `corral rm` left as DIR/rm/model")


def _check_critic(recipe: Recipe, path: str) -> None:
    from app.models.load import is_encoder
    from app.models.vocabulary import require_critic_vocabulary

    if Path(path).expanduser().is_dir() and is_encoder(Path(path).expanduser()):
        raise ModelError(
            f"reward.path = {path}: it is an encoder, and PPO's critic starts from the reward model's decoder; train a reward model from a "
            "causal language model with `corral rm`, set ppo.critic_model = value_head, or choose an algorithm without a critic, such as "
            "ppo.algorithm.name = rloo"
        )
    if _both_are_here(recipe.model.path, path):
        require_critic_vocabulary(path, recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)


def _both_are_here(policy: str, scorer: str) -> bool:
    return policy not in BUILT_IN_MODELS and all(Path(path).expanduser().is_dir() for path in (policy, scorer))


def read_data(recipe: Recipe, command: str, run: RunFolder) -> Corpus:
    """The corpus, with what the command needs in it. Raises DataError."""
    corpus = load_corpus(recipe.data, seed=recipe.run.seed, folder=run.path / DATA)
    for require in REQUIRED_DATA[command]:
        require(corpus)
    if _scores_references(recipe, command):
        require_references(corpus)
    if _mixes_pretraining(recipe, command):
        corpus = replace(corpus, pretraining=load_pretraining(recipe, run.path / DATA / PRETRAINING))
    run.record_data(corpus.sha256, **corpus.facts())
    return corpus
