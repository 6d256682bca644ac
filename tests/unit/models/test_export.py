"""`corral export`: the same model in another shape, nothing lost on the way, nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from app.models import export
from app.models.heads import load_reward_model, reward_offset, sequence_scores
from jobs.main import main
from tests.tiny_models import VOCABULARY, make_llama, make_neox, make_reward_model

IDS_BS = torch.from_numpy(np.random.default_rng(0).integers(4, VOCABULARY, (3, 20)))
ATTENTION_BS = torch.ones_like(IDS_BS, dtype=torch.bool)


@pytest.fixture(params=[make_neox, make_llama], ids=["neox", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    made = str(request.param(tmp_path / "model"))
    GenerationConfig(do_sample=True, temperature=0.75, eos_token_id=1).save_pretrained(made)
    return made


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS_BS).logits


def exported(folder: str, *options: str) -> Path:
    """Where the command has put it."""
    output = Path(f"{folder}-exported")
    assert main(["export", folder, "--output", str(output), *options]) == 0
    return output


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*argv: str) -> str:
        code = main(["export", *argv])
        error = capfd.readouterr().err
        assert code == 2
        assert error.startswith("corral: error: ")
        assert error.count("\n") == 1
        return error

    return run


def test_fp32_is_the_same_model_with_all_that_belongs_to_it(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = exported(folder, "--dtype", "fp32")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(output)), logits(AutoModelForCausalLM.from_pretrained(folder)))
    tokenizer, original = AutoTokenizer.from_pretrained(output), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.chat_template == original.chat_template
    assert GenerationConfig.from_pretrained(output).temperature == 0.75
    assert not list(output.parent.glob(".*"))
    assert "torch.float32" in capsys.readouterr().out


def test_others_may_read_the_weights_as_they_may_the_config(folder: str) -> None:
    output = exported(folder)
    modes = {file.stat().st_mode for file in output.iterdir()}
    assert modes == {(output / "config.json").stat().st_mode}


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_recast_and_shards_are_no_larger_than_asked(folder: str, name: str, dtype: torch.dtype) -> None:
    output = exported(folder, "--dtype", name, "--shard-size", "40KB")
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 2
    stored = [load_file(file) for file in files]
    assert {tensor.dtype for shard in stored for tensor in shard.values()} == {dtype}
    assert all(sum(t.nbytes for t in shard.values()) <= 40_000 for shard in stored)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == dtype
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, before[key].to(dtype)) for key, tensor in model.state_dict().items())
    again = exported(str(output))
    assert {tensor.dtype for tensor in load_file(again / "model.safetensors").values()} == {dtype}, "without --dtype as it is stored"


@torch.no_grad()
def test_a_reward_model_keeps_its_scores_and_its_zero(folder: str) -> None:
    rm = make_reward_model(Path(folder).with_name("rm"), folder, reward_offset=0.375)
    output = exported(rm, "--shard-size", "40KB")
    before, after = load_reward_model(rm), load_reward_model(str(output))
    assert torch.equal(sequence_scores(after, IDS_BS, ATTENTION_BS), sequence_scores(before, IDS_BS, ATTENTION_BS))
    assert reward_offset(after) == 0.375
    assert AutoModelForSequenceClassification.from_pretrained(output).config.num_labels == 1


@torch.no_grad()
def test_a_reward_model_without_its_head_is_its_trunk(folder: str) -> None:
    rm = make_reward_model(Path(folder).with_name("rm"), folder, reward_offset=0.375)
    output = exported(rm, "--drop-heads")
    trunk = AutoModel.from_pretrained(output)
    assert torch.equal(trunk(IDS_BS).last_hidden_state, load_reward_model(rm).base_model(IDS_BS).last_hidden_state)
    config = json.loads((output / "config.json").read_text())
    assert "reward_offset" not in config
    assert not any("score" in name for name in load_file(output / "model.safetensors"))


def add_weight(folder: str, name: str) -> None:
    file = Path(folder) / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(1, 64)}, file, metadata={"format": "pt"})


def test_a_value_head_beside_the_language_model_is_left_out_when_asked(folder: str, refused: Any) -> None:
    before = logits(AutoModelForCausalLM.from_pretrained(folder))
    add_weight(folder, "v_head.summary.weight")
    output = Path(f"{folder}-exported")
    assert "v_head.summary.weight" in (error := refused(folder, "--output", str(output)))
    assert "--drop-heads" in error
    assert not output.exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(exported(folder, "--drop-heads"))), before)
    assert not any("v_head" in name for name in load_file(output / "model.safetensors"))


def test_weights_without_a_place_are_never_lost(folder: str, refused: Any) -> None:
    add_weight(folder, "layers.7.mystery")
    assert "no place for the weights layers.7.mystery" in refused(folder, "--output", f"{folder}-exported", "--drop-heads")


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_an_adapter_is_merged_into_its_base(folder: str, tmp_path: Path, own_tokenizer: bool) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted, plain = logits(model), logits(AutoModelForCausalLM.from_pretrained(folder))
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    if own_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.save_pretrained(adapter)
    output = exported(str(adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(output))
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)
    assert (AutoTokenizer.from_pretrained(output).chat_template == "{{ messages }}") == own_tokenizer
    assert not (output / "adapter_config.json").exists()


def test_an_adapter_whose_base_is_gone(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "./gone"}))
    assert "model ./gone: no such folder" in refused(str(tmp_path), "--output", str(tmp_path / "out"))


def test_nothing_is_overwritten_and_bad_input_is_one_line(folder: str, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    assert "is not empty: nothing is overwritten" in refused(folder, "--output", str(tmp_path / "full"))
    assert "is a file" in refused(folder, "--output", str(tmp_path / "full" / "file"))
    assert (tmp_path / "full" / "file").read_text() == "kept"
    out = str(tmp_path / "out")
    assert "no such folder" in refused("./nowhere", "--output", out)
    assert "--shard-size=big is no size" in refused(folder, "--output", out, "--shard-size", "big")
    assert "no option --data.path=x" in refused(folder, "--output", out, "--data.path=x")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(str(tmp_path / "empty"), "--output", out)
    assert main(["export", folder, "--output", str(tmp_path / "empty")]) == 0


def test_a_failed_export_leaves_nothing(folder: str, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "sync_tree", full)
    before = sorted(tmp_path.iterdir())
    assert "No space left on device" in refused(folder, "--output", str(tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_made_is_told(folder: str, refused: Any) -> None:
    assert "/proc/exported: cannot be written (" in refused(folder, "--output=/proc/exported")


def test_cut_off_weights_are_told(folder: str, tmp_path: Path, refused: Any) -> None:
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"model {folder}: cannot be loaded (" in refused(folder, f"--output={tmp_path / 'exported'}")


def test_a_hub_that_cannot_be_reached_is_one_line_before_anything_is_written(
    folder: str, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(folder, "--output", str(tmp_path / "out"), "--push", "somebody/model")
    assert "--push somebody/model: the Hugging Face hub does not take it" in error
    assert "offline mode is enabled" in error
    assert not (tmp_path / "out").exists()


def test_push_sends_the_folder_that_was_written(folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Hub:
        commit_url = "https://hub.invalid/commit"

        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Hub:
            calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))
            if repo_id == "somebody/full":
                raise OSError("403 Forbidden")
            return self

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    output = exported(folder, "--push", "somebody/model")
    assert calls[0] == ("somebody/model", {"private": True, "exist_ok": True})
    assert calls[1] == ("somebody/model", sorted(file.name for file in output.iterdir()))
    assert capsys.readouterr().out.endswith("https://hub.invalid/commit\n")
    assert main(["export", folder, "--output", f"{output}-2", "--push", "somebody/full"]) == 1
    assert f"`hf upload somebody/full {output}-2` tries again" in capsys.readouterr().err
