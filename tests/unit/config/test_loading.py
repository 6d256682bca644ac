"""Recipes: layering, overrides, and one-line errors that name the place and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.config.keys import nearest_key, recipe_keys
from app.config.loading import load_recipe, resolved, to_toml, with_values
from app.config.ppo import PolicyAdapterConfig
from app.config.recipe import Recipe
from app.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path / "recipe.toml", "[ppo]\nsteps = 3\n[ppo.kl]\ncoef = 0.1\n[ppo.deepspeed.extra]\na = 1\n")


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path / "a.toml", "")) == Recipe()


def test_layers_go_left_to_right_then_the_recipe_then_overrides(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", "[ppo]\nsteps = 1\nepochs = 1\nbatch_size = 8\nsave_every = 1\n")
    write(tmp_path / "b.toml", "[ppo]\nepochs = 2\nbatch_size = 16\nsave_every = 2\n")
    (tmp_path / "inner").mkdir()
    path = write(tmp_path / "inner" / "c.toml", 'extends = ["../a.toml", "../b.toml"]\n[ppo]\nbatch_size = 32\nsave_every = 3\n')
    ppo = load_recipe(path, ["--ppo.save_every=4"]).ppo
    assert (ppo.steps, ppo.epochs, ppo.batch_size, ppo.save_every) == (1, 2, 32, 4)


def test_key_value_equals_key_space_value(recipe: Path) -> None:
    assert load_recipe(recipe, ["--ppo.kl.coef", "0.2", "--ppo.steps", "9"]) == load_recipe(recipe, ["--ppo.kl.coef=0.2", "--ppo.steps=9"])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("--run.resume=false", "run.resume", False),
        ("--run.dir=runs/a b", "run.dir", "runs/a b"),
        ("--run.dir=5", "run.dir", "5"),
        ("--run.dir=true", "run.dir", "true"),
        ('--data.lang=["en", "de"]', "data.lang", ["en", "de"]),
        ("--data.lang=de", "data.lang", ["de"]),
        ("--data.lang=[]", "data.lang", []),
        ("--tracking.also=wandb", "tracking.also", ["wandb"]),
        ("--data.columns.responses=answers", "data.columns.responses", "answers"),
        ("--ppo.algorithm.ppo.value_clip=null", "ppo.algorithm.ppo.value_clip", None),
        ("--ppo.reward.missing_eos_score", "ppo.reward.missing_eos_score", -2.5),
        ("--data.path=https://host/x.jsonl?a=b", "data.path", "https://host/x.jsonl?a=b"),
        ("--sft.optimizer.lr=1e-3", "sft.optimizer.lr", 1e-3),
    ],
)
def test_override_values(recipe: Path, override: str, key: str, value: object) -> None:
    words = [override] if "=" in override else [override, str(value)]
    assert resolved(load_recipe(recipe, words))[key] == value


def test_free_tables_take_any_key(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["--ppo.deepspeed.extra.b.c=2", '--tune.space.ppo.kl.coef={type = "uniform", low = 0.0, high = 1.0}'])
    assert loaded.ppo.deepspeed.extra == {"a": 1, "b": {"c": 2}}
    assert list(loaded.tune.space) == ["ppo.kl.coef"]


def test_an_entry_of_a_free_table_takes_words_as_a_key_of_its_own_does() -> None:
    mine = load_recipe(None, ["--data.sets.mine.path=5", "--data.sets.mine.lang=de"]).data.sets["mine"]
    assert (mine.path, mine.lang) == ("5", ("de",))


def test_a_section_that_may_be_absent_is_there_once_one_of_its_keys_is_given(recipe: Path, tmp_path: Path) -> None:
    assert load_recipe(recipe).ppo.lora is None
    loaded = load_recipe(recipe, ["--ppo.lora.rank=4", '--ppo.lora.targets=["q_proj"]'])
    assert loaded.ppo.lora == PolicyAdapterConfig(rank=4, targets=("q_proj",))
    base = write(tmp_path / "lora.toml", "[ppo.lora]\nrank = 2\nalpha = 8\n")
    assert load_recipe(base, ["--ppo.lora.rank=4"]).ppo.lora == PolicyAdapterConfig(rank=4, alpha=8)
    assert load_recipe(base, ["--ppo.lora=null"]).ppo.lora is None


def test_a_section_of_which_one_key_is_given_keeps_its_other_defaults(tmp_path: Path) -> None:
    """Not those of its class: `--help` lists the former."""
    path = write(tmp_path / "a.toml", "[alarms.entropy]\nlimit = 0.1\n[ppo]\npolicy = { lr = 1e-5 }\n")
    given = {"alarms.entropy.limit": 0.1, "ppo.policy.lr": 1e-5, "alarms.kl.action": "stop", "scoring.reward.gpus": 1.0}
    assert resolved(load_recipe(path, ["--alarms.kl.action=stop", "--scoring.reward.gpus=1"])) == resolved(Recipe()) | given


def test_resolved_recipe_reads_back(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, ['--tune.space.ppo.epochs={type = "choice", values = [1, 2]}', "--ppo.reward.missing_eos_score=null"])
    assert load_recipe(write(tmp_path / "again.toml", to_toml(loaded))) == loaded


def test_with_values_checks_the_whole_recipe() -> None:
    assert with_values(Recipe(), {"ppo.kl.coef": 0.3}).ppo.kl.coef == 0.3
    assert with_values(Recipe(), {"ppo.lora.rank": 4}).ppo.lora == PolicyAdapterConfig(rank=4)
    with pytest.raises(ConfigError, match="multiple of"):
        with_values(Recipe(), {"ppo.minibatches": 7})


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("--ppo.kl.coeff=1", ["ppo.kl.coeff", "did you mean ppo.kl.coef?"]),
        ("--kl.coef=1", ["did you mean ppo.kl.coef?"]),
        ("--ppo.lr=1", ["did you mean ppo.policy.lr?"]),
        ("--ppo.stepz=1", ["did you mean ppo.steps?"]),
        ("--ppo=1", ["section", "ppo.steps"]),
        ("--ppo.steps=many", ["--ppo.steps", '"many"', "integer", "default: 100"]),
        ("--ppo.steps=0", ["greater than or equal to 1"]),
        ("--ppo.steps", ["no value", "--ppo.steps=VALUE"]),
        ("steps", ["unexpected argument", "--dotted.key=value"]),
        ("--data.lang=en,de", ['data.lang = "en,de": should be a list, in brackets', 'default: ["en"]']),
        ("--data.lang=", ["data.lang", 'default: ["en"]']),
        ("--tracking.also=wandbb", ["should be a list of wandb | mlflow"]),
        ("--data.sets.path=x", ["a name of your own comes first", "did you mean data.sets.NAME.path?"]),
        ("--serving.models.path=x", ["did you mean serving.models.NAME.path?"]),
        ("--serving.models=x", ["should be a table", "such as serving.models.NAME.path"]),
        ("--serving.models.a=x", ["should be a table", "such as serving.models.a.path"]),
        ("--serving.models.a.version=2", ["serving.models.a.path is required"]),
        ("--serving.models.a.verson=2", ["unknown key serving.models.a.verson: did you mean version?"]),
        ("--data.sets.a.format=csv", ["data.sets.a.format", "'oasst'", 'default: "auto"']),
        ("--ppo.lora=x", ["should be a table", "such as ppo.lora.rank"]),
        ("--tune.space.ppo.steps=4", ["should be a table"]),
        ("--run.dir=", ["run: dir is empty", "such as runs/mine"]),
        ("--ppo.policy.betas=[0.9]", ["command line: --ppo.policy.betas", "= [0.9]: entry 2: field required; default: [0.9, 0.95]"]),
        ("--ppo.policy.betas=[1, 'x']", ["--ppo.policy.betas", 'betas = [1, "x"]: entry 2: input should be a valid number', "default: [0"]),
        ("--ppo.minibatches=7", ["choose a multiple"]),
        ("--ppo.reuse_forward=true", ["ppo.reuse_forward needs epochs = minibatches = 1", "set ppo.reuse_forward = false"]),
        ("--rollout.top_p=0.7", ["set rollout.top_p = 1.0"]),
        ("--ppo.algorithm.name=gpro", ["ppo.algorithm.name", "choose one of ppo, grpo, rloo, reinforce_pp"]),
        ("--ppo.algorithm.name=grpo", ["ppo.samples_per_prompt = 1", "set ppo.samples_per_prompt to 2 or more"]),
        ("--ppo.algorithm.grpo.mean_over=tokens", ["ppo.algorithm.grpo.mean_over is not read", "belongs to grpo"]),
        ("--ppo.samples_per_prompt=5", ["ppo.batch_size = 64 is no multiple", "choose 60"]),
        ("--ppo.kl.controller=adaptive", ["has no target", "nats per sequence"]),
        ("--ppo.kl.place=both_sides", ["ppo.kl.place"]),
        ("--alarms.kl.action=foo", ['alarms.kl.action = "foo"', "'warn', 'stop' or 'off'", 'default: "warn"']),
        ("--ppo.lora.rnk=4", ["unknown key ppo.lora.rnk", "did you mean rank?"]),
        ("--ppo.lora.rank=0", ["ppo.lora.rank = 0", "greater than or equal to 1", "default: 16"]),
        ("--ppo.lora.dropout=0.1", ["ppo.lora", "importance ratio", "set ppo.lora.dropout = 0"]),
        ("--ppo.reward.overlong_buffer=65", ["longer than rollout.max_new_tokens = 64"]),
        ("--tune.space.ppo.kl.cof={type='choice', values=[1]}", ["tune.space", "did you mean ppo.kl.coef?"]),
        ("--tune.space.ppo.kl.coef={type='choice', values=[0.1, -1]}", ["tune.space", "ppo.kl.coef = -1"]),
    ],
)
def test_a_wrong_override_is_refused_with_its_remedy(recipe: Path, override: str, parts: list[str]) -> None:
    message = refusal(recipe, override)
    assert all(part in message for part in parts), message


def test_the_default_of_a_table_is_none_of_what_it_holds(recipe: Path) -> None:
    message = refusal(recipe, "--reward.parts.brief.type=length", "--reward.parts.brief.maximum=long")
    assert message.endswith('reward.parts.brief.maximum = "long": input should be a valid integer, unable to parse string as an integer')


VALUE_HEAD = ["--ppo.critic_model=value_head"]
TEXTS = ["--ppo.pretraining.path=texts.txt", "--ppo.pretraining.coef=1"]
NO_CRITIC = ["--ppo.algorithm.name=rloo", "--ppo.samples_per_prompt=4"]
KL_FORMS = '--tune.space.ppo.kl.loss_form={type = "choice", values = ["k2", "k3"]}'


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([*NO_CRITIC, "--ppo.algorithm.ppo.value_clip=0.3"], ["ppo.algorithm.ppo.value_clip is not read", "belongs to ppo"]),
        ([*NO_CRITIC, "--ppo.critic.lr=1e-5"], ["ppo.critic.lr is not read", "rloo trains no critic"]),
        ([*NO_CRITIC, '--tune.space.ppo.critic.lr={type = "uniform", low = 1e-6, high = 1e-5}'], ["tune.space", "rloo trains no critic"]),
        (["--ppo.deepspeed.extra.train_batch_size=3"], ["deepspeed.extra.train_batch_size", "set batch_size"]),
        (["--ppo.deepspeed.extra.optimizer.type=SGD"], ["deepspeed.extra.optimizer", "set lr"]),
        (["--ppo.kl.loss_form=k2"], ["ppo.kl.loss_form is not read", "in the reward alone", "choose another ppo.kl.place than reward"]),
        (["--ppo.kl.horizon=500"], ["ppo.kl.horizon is not read", "choose another ppo.kl.controller than fixed"]),
        (["--ppo.reward.overlong_penalty=2"], ["overlong_penalty is not read", "choose another ppo.reward.overlong_buffer than null"]),
        ([KL_FORMS], ["tune.space", "ppo.kl.loss_form is not read"]),
        (["--ppo.lora.rank=4", "--ppo.freeze_layers=1"], ["ppo", "freeze_layers and lora exclude each other"]),
        (["--ppo.max_lag=1", "--ppo.algorithm.max_importance=null"], ["ppo.max_lag = 1", "set ppo.algorithm.max_importance = 2.0"]),
        (
            ["--ppo.algorithm.name=reinforce_pp", "--ppo.algorithm.reinforce_pp.group_baseline=true"],
            ["compares the samples of a prompt", "set ppo.samples_per_prompt"],
        ),
        (["--ppo.kl.controller=adaptive", "--ppo.kl.target=6", "--ppo.kl.coef=0"], ["is 0 and stays so"]),
        (
            ["--ppo.kl.controller=adaptive", "--ppo.kl.target=6", "--ppo.kl.horizon=12", "--ppo.batch_size=64"],
            ["ppo.kl.horizon = 12", "0 or negative", "set ppo.kl.horizon = 64 or more"],
        ),
        (["--ppo.reward.missing_eos_penalty=1"], ["set missing_eos_score = null"]),
        (["--rollout.min_engines=3", "--rollout.engines.count=2"], ["rollout.min_engines = 3", "rollout.engines.count = 2"]),
        (["--rollout.min_engines=1", "--rollout.engines.gpus=1"], ["rollout.min_engines", 'rollout.transfer = "object_store"']),
        (["--rollout.min_engines=1", "--run.determinism=exact"], ["rollout.min_engines = 1", "null"]),
        ([*NO_CRITIC, "--ppo.critic_model=value_head"], ["ppo.critic_model is not read", "rloo trains no critic"]),
        ([*NO_CRITIC, "--ppo.critic_warmup_steps=2"], ["rloo has none", "set ppo.critic_warmup_steps = 0"]),
        (["--ppo.critic_warmup_steps=3"], ["leaves none of ppo.steps = 3"]),
        ([*VALUE_HEAD, "--ppo.critic.lr=1e-5"], ["ppo.critic.lr is not read", "choose another ppo.critic_model than value_head"]),
        (
            [*VALUE_HEAD, "--ppo.critic_warmup_steps=2", "--ppo.policy.weight_decay=0.1"],
            ["would shrink the policy", "set ppo.policy.weight_decay = 0"],
        ),
        (["--ppo.max_lag=1", "--rollout.colocate=true"], ["ppo.max_lag = 1 has the engines sample", "rollout.colocate = false"]),
        (["--rollout.in_flight=redo"], ['rollout.in_flight = "redo"', "ppo.max_lag = 0 has none", 'rollout.in_flight = "keep"']),
        (["--rollout.in_flight=wait"], ['rollout.in_flight = "wait"', "set ppo.max_lag = 1 or more"]),
        (["--rollout.max_model_len=319"], ["rollout.max_model_len = 319 is too short", "raise it to 320, leave it out"]),
        (
            ["--ppo.reward.delta=true", "--data.max_length=319"],
            ["data.max_length = 319 leaves 63 behind", "data.max_prompt_length = 256", "set data.max_length = 320 or more"],
        ),
        (["--rollout.ignore_eos=true"], ["ppo.reward.missing_eos_score = -1", 'set ppo.reward.missing_eos_score = "null"']),
        (
            ["--rollout.ignore_eos=true", "--ppo.reward.missing_eos_score=null", "--ppo.reward.missing_eos_penalty=2"],
            ["ppo.reward.missing_eos_penalty = 2", "set ppo.reward.missing_eos_penalty = 0"],
        ),
        (["--model.precision=bf16", "--ppo.deepspeed.zero_stage=0"], ["trains wrongly in bf16: set ppo.deepspeed.zero_stage = 1"]),
        (["--model.precision=fp16", "--sft.deepspeed.zero_stage=0"], ["trains wrongly in fp16: set sft.deepspeed.zero_stage = 1"]),
        (["--model.precision=bf16", "--rm.deepspeed.zero_stage=0"], ["rm.deepspeed.zero_stage = 0", 'model.precision = "fp32"']),
        (["--ppo.pretraining.coef=1"], ["weighs the loss on text that is not given", "set path"]),
        (
            [*TEXTS, "--ppo.pretraining.batch_size=30", "--ppo.workers.count=2"],
            ["ppo.pretraining.batch_size = 30 is no multiple", "choose a multiple of 16"],
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(recipe: Path, overrides: list[str], parts: list[str]) -> None:
    message = refusal(recipe, *overrides)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("betas", ["[0.9, 1.0]", "[-0.1, 0.95]"])
def test_moments_decay(recipe: Path, betas: str) -> None:
    """Adam would refuse them, once its workers are up."""
    message = refusal(recipe, f"--ppo.policy.betas={betas}")
    assert f"ppo.policy.betas = {betas}" in message and "from 0 to below 1" in message


@pytest.mark.parametrize("key", ["ppo.policy.lr", "ppo.kl.coef", "rollout.temperature", "alarms.kl.limit"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(recipe: Path, key: str, value: str) -> None:
    """An infinite rate or temperature would be noticed in the first update, and a limit of NaN never."""
    assert f"command line: --{key}: {key} = " in refusal(recipe, f"--{key}={value}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["--rollout.colocate=true"],
        ["--ppo.max_lag=1", "--rollout.in_flight=redo"],
        ["--rollout.max_model_len=320"],
        ["--ppo.reward.delta=true", "--data.max_length=320"],
        ["--data.max_length=319"],
        ["--rollout.ignore_eos=true", "--ppo.reward.missing_eos_score=null"],
        ["--model.precision=bf16", "--ppo.deepspeed.zero_stage=1"],
        ["--ppo.deepspeed.zero_stage=0"],
        ["--ppo.kl.loss_form=k2", "--ppo.kl.place=both"],
        ["--ppo.kl.loss_form=k2", "--ppo.algorithm.name=grpo", "--ppo.samples_per_prompt=4"],
        ["--ppo.reward.overlong_buffer=8", "--ppo.reward.overlong_penalty=2"],
        [KL_FORMS, '--tune.space.ppo.kl.place={type = "choice", values = ["reward", "loss"]}'],
        [KL_FORMS, '--tune.space.ppo.algorithm.name={type = "choice", values = ["ppo", "grpo"]}', "--ppo.samples_per_prompt=4"],
        ["--ppo.kl.controller=adaptive", "--ppo.kl.target=6", "--ppo.kl.horizon=13", "--ppo.batch_size=64"],
    ],
)
def test_what_looks_like_a_contradiction_and_is_none(recipe: Path, overrides: list[str]) -> None:
    load_recipe(recipe, overrides)


def test_a_warm_up_that_the_training_ends_in_is_told(recipe: Path) -> None:
    """Not refused: a few steps of a long recipe are how one tries it out."""
    told = load_recipe(
        recipe, ["--ppo.steps=4", "--ppo.epochs=2", "--ppo.policy.warmup_steps=16", "--ppo.critic.warmup_steps=8"]
    ).ppo.doubts()
    assert told == [
        "ppo.policy.warmup_steps = 16 is more than the 8 optimizer steps of this training: the rate rises to 50% of ppo.policy.lr; "
        "lower the one, or raise the other"
    ]
    one_less = [
        "--ppo.steps=4",
        "--ppo.epochs=2",
        "--ppo.critic_warmup_steps=1",
        "--ppo.policy.warmup_steps=7",
        "--ppo.critic.warmup_steps=9",
    ]
    assert [text.split()[0] for text in load_recipe(recipe, one_less).ppo.doubts()] == [
        "ppo.policy.warmup_steps",
        "ppo.critic.warmup_steps",
    ]
    assert load_recipe(recipe, [*NO_CRITIC, "--ppo.steps=4"]).ppo.doubts() == []


def test_changing_the_algorithm_alone_leaves_what_was_inherited(recipe: Path, tmp_path: Path) -> None:
    """Options of PPO and of its critic in an extended file are no mistake of one who asks for another algorithm; beside it they are."""
    write(tmp_path / "base.toml", "[ppo]\nalgorithm = { ppo = { value_coef = 1.0 } }\ncritic = { lr = 1e-4 }\n")
    top = write(tmp_path / "top.toml", 'extends = ["base.toml"]\n')
    loaded = load_recipe(top, NO_CRITIC)
    assert loaded.ppo.make_algorithm().has_critic is False
    beside = write(tmp_path / "beside.toml", "[ppo]\nsamples_per_prompt = 4\nalgorithm = { name = 'rloo', ppo = { value_coef = 1.0 } }\n")
    assert "ppo.algorithm.ppo.value_coef is not read" in refusal(beside)
    again = to_toml(loaded)
    assert "# ppo.critic.lr = 0.0001  (not read: rloo trains no critic)" in again
    assert load_recipe(write(tmp_path / "again.toml", again)).ppo.make_algorithm() == loaded.ppo.make_algorithm()


def test_a_value_head_leaves_the_critics_optimizer_unread(recipe: Path) -> None:
    ppo = load_recipe(recipe, VALUE_HEAD).ppo
    assert (ppo.has_critic_model, ppo.has_value_head) == (False, True)
    assert "# ppo.critic.lr = 3e-06  (not read: ppo.policy is what trains a value head)" in to_toml(load_recipe(recipe, VALUE_HEAD))
    assert (Recipe().ppo.has_critic_model, Recipe().ppo.has_value_head) == (True, False)
    without = load_recipe(recipe, NO_CRITIC).ppo
    assert (without.has_critic_model, without.has_value_head) == (False, False)


def test_the_warm_up_takes_steps_from_the_policy_alone(recipe: Path) -> None:
    ppo = load_recipe(recipe, ["--ppo.steps=10", "--ppo.critic_warmup_steps=3", "--ppo.epochs=2", "--ppo.minibatches=4"]).ppo
    assert [ppo.policy_learns(step) for step in (0, 2, 3, 9)] == [False, False, True, True]
    assert (ppo.optimizer_steps(of_policy=True), ppo.optimizer_steps(of_policy=False)) == (56, 80)


def test_the_penalty_stands_where_the_algorithm_has_it_unless_told_otherwise(recipe: Path) -> None:
    def where(*overrides: str) -> tuple[bool, str | None]:
        surrogate = load_recipe(recipe, overrides).ppo.make_algorithm().surrogate
        return surrogate.kl_in_reward, surrogate.kl_in_loss

    grpo = ("--ppo.algorithm.name=grpo", "--ppo.samples_per_prompt=4")
    assert where() == (True, None)
    assert where("--ppo.kl.place=loss", "--ppo.kl.loss_form=k2") == (False, "k2")
    assert where("--ppo.kl.place=both") == (True, "k3")
    assert where(*grpo) == (False, "k3")
    assert where(*grpo, "--ppo.kl.place=reward") == (True, None)


def test_defaults_are_those_of_the_vetted_recipe() -> None:
    """Huang et al. 2024: PPO on language models, with 4 epochs of one minibatch and AdamW at eps 1e-5."""
    ppo = Recipe().ppo
    algorithm = ppo.make_algorithm()
    assert (algorithm.config.gamma, algorithm.config.lam, algorithm.config.whiten_advantages) == (1.0, 0.95, True)
    assert (algorithm.config.value_clip, algorithm.config.value_coef, algorithm.surrogate.config.clip) == (0.2, 0.1, 0.2)
    assert (ppo.epochs, ppo.minibatches, ppo.policy.lr, ppo.policy.eps, ppo.policy.weight_decay) == (4, 1, 3e-6, 1e-5, 0.0)
    assert (ppo.critic.lr, ppo.critic.eps) == (3e-6, 1e-5)
    assert (ppo.kl.coef, ppo.kl.controller, algorithm.surrogate.kl_in_reward, algorithm.surrogate.kl_in_loss) == (0.05, "fixed", True, None)
    assert (ppo.reward.missing_eos_score, ppo.reward.clip, ppo.reward.scale) == (-1.0, None, None)
    assert (algorithm.surrogate.config.max_importance, algorithm.surrogate.config.entropy_coef) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[ppo\n", ["malformed TOML", "line 1"]),
        ("[run]\nseed = 1\nseed = 2\n", ["malformed TOML", "line 3"]),
        ("[ppo.klx]\ncoef = 1\n", ["unknown key ppo.klx.coef", "did you mean ppo.kl.coef?"]),
        ("ppo = 3\n", ["ppo is a section"]),
        ('[sft.optimizer]\nlr = "fast"\n', ["sft.optimizer.lr", '"fast"', "number"]),
        ("extends = 'a.toml'\n", ["extends must be a list"]),
        ('extends = ["recipe.toml"]\n', ["leads back"]),
        ('extends = ["nowhere.toml"]\n', ["nowhere.toml", "no such recipe"]),
        ('[data]\nformat = "csv"\n', ["data.format", "csv"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(write(tmp_path / "recipe.toml", text))
    assert all(part in message for part in [str(tmp_path), *parts]), message


def test_the_layer_that_holds_the_mistake_is_named(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", "[ppo]\nsteps = -1\n")
    assert "base.toml: ppo.steps" in refusal(write(tmp_path / "top.toml", 'extends = ["base.toml"]\n'))


def test_a_missing_file_gets_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path / "pipeline.toml", "")
    assert f"did you mean {tmp_path / 'pipeline.toml'}?" in refusal(tmp_path / "pipelin.toml")
    assert "is a folder" in refusal(tmp_path)


def test_only_recipes_are_suggested_with_paths_that_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "pyproject.toml", '[project]\nname = "x"\n')
    assert "pyproject" not in refusal(tmp_path / "pproject.toml")
    (tmp_path / "jobs" / "tiny").mkdir(parents=True)
    write(tmp_path / "jobs" / "tiny" / "sft.toml", "[sft]\nepochs = 1\n")
    monkeypatch.chdir(tmp_path)
    assert refusal(Path("nowhere.toml")).endswith("no such recipe: there is jobs/tiny/sft.toml")


def test_every_key_has_a_description() -> None:
    assert [name for name, key in recipe_keys().items() if not key.description and not name.startswith("tune.space")] == []
    assert nearest_key("zzzz") is None


def test_exact_runs_sample_and_score_whole_batches(tmp_path: Path) -> None:
    exact = load_recipe(None, ["--run.determinism=exact"])
    assert (exact.ppo.score_pieces, exact.scoring.alone) == (1, True)
    for option, remedy in (("--ppo.score_pieces=2", "set ppo.score_pieces = 1"), ("--ppo.max_lag=1", "set ppo.max_lag = 0")):
        with pytest.raises(ConfigError, match=remedy):
            load_recipe(None, ["--run.determinism=exact", option])


def test_a_home_folder_is_found_where_the_shell_leaves_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `--run.dir=~/runs`; a folder called ~ would be made, and hard to remove."""
    monkeypatch.setenv("HOME", "/home/me")
    assert load_recipe(recipe, ["--run.dir=~/runs/a"]).run.dir == "/home/me/runs/a"
    for key in ("run.dir", "model.path", "data.path", "reward.path", "data.sets.mine.path"):
        assert "no user nobody-here has a home on this machine" in refusal(recipe, f"--{key}=~nobody-here/x")


def test_a_switch_is_no_number(recipe: Path) -> None:
    """`patience = true` would be patience with one evaluation, and `steps = true` a run of one step."""
    for key in ("sft.patience", "ppo.steps", "ppo.kl.coef", "rollout.min_engines", "ppo.deepspeed.zero_stage"):
        assert f"{key} = true: should be a number" in refusal(recipe, f"--{key}=true")
    assert "not true or false" in refusal(recipe, "--ppo.policy.betas=[false, 0.5]")
    assert "should be a number" not in refusal(recipe, "--ppo.policy.betas=true"), "a pair"
    inside = refusal(recipe, "--serving.models.a.path=x", "--serving.models.a.max_replicas=true")
    assert "serving.models.a.max_replicas = true: should be a number" in inside
    assert load_recipe(recipe, ["--run.resume=false", "--rm.share_prefix=true", "--run.dir=true"]).rm.share_prefix is True
