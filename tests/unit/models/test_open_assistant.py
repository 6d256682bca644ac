"""Open-Assistant's reward-model folders against a literal computation, and their way through everything that loads a reward model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPTNeoXModel

from app.config.shared import ModelConfig
from app.data.templates import build_template
from app.errors import ModelError
from app.models.forward import pad_sequences
from app.models.heads import ValueModel, convert_reward_model, init_reward_model, load_reward_model, reward_offset, sequence_scores
from app.models.load import check_model_folder, load_config, load_tokenizer, resolve_model, writes_text
from app.models.scoring import ScoringModel, kind_of
from tests.tiny_models import CONTEXT, VOCABULARY, make_tokenizer

HIDDEN, LAYERS, BIAS = 64, 2, 1.25
CONFIG = {
    "architectures": ["GPTNeoXRewardModel"],
    "model_type": "gpt_neox_reward_model",
    "vocab_size": VOCABULARY + 12,  # rows to spare, as the published ones have
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.5,
    "rotary_emb_base": 5000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def write_folder(folder: Path, *, pooling: str, safetensors: bool) -> dict[str, torch.Tensor]:
    """By hand, weight by weight, with the buffers that old versions of transformers saved. Returns the weights."""
    draw = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.2

    state = {"gpt_neox.embed_in.weight": random(CONFIG["vocab_size"], HIDDEN)}
    for number in range(LAYERS):
        layer = f"gpt_neox.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state |= {f"{layer}.{norm}.weight": 1 + random(HIDDEN), f"{layer}.{norm}.bias": random(HIDDEN)}
        for name, rows, columns in (
            ("attention.query_key_value", 3 * HIDDEN, HIDDEN), ("attention.dense", HIDDEN, HIDDEN),
            ("mlp.dense_h_to_4h", 96, HIDDEN), ("mlp.dense_4h_to_h", HIDDEN, 96),
        ):  # fmt: skip
            state |= {f"{layer}.{name}.weight": random(rows, columns), f"{layer}.{name}.bias": random(rows)}
        state[f"{layer}.attention.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.bool).tril()
        state[f"{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        state[f"{layer}.attention.rotary_emb.inv_freq"] = 1 / 5000 ** (torch.arange(0, 16, 2) / 16)
    state |= {"gpt_neox.final_layer_norm.weight": 1 + random(HIDDEN), "gpt_neox.final_layer_norm.bias": random(HIDDEN)}
    state |= {"out_proj.weight": random(1, HIDDEN), "out_proj.bias": torch.tensor([BIAS])}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"pooling": pooling}))
    if safetensors:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|prefix_begin|>", "<|prefix_end|>"]})
    tokenizer.save_pretrained(folder)
    return state


@torch.no_grad()
def literal_scores(state: dict[str, torch.Tensor], pooling: str, sequences: list[np.ndarray]) -> torch.Tensor:
    """out_proj over the last or the mean hidden state of each sequence alone."""
    plain = {key: value for key, value in CONFIG.items() if key not in ("model_type", "architectures", "torch_dtype")}
    trunk = GPTNeoXModel(GPTNeoXModel.config_class(**plain)).eval()
    weights = {name.removeprefix("gpt_neox."): tensor for name, tensor in state.items() if name.startswith("gpt_neox.")}
    trunk.load_state_dict({name: tensor for name, tensor in weights.items() if name in trunk.state_dict()}, strict=True)
    scores = []
    for ids in sequences:
        hidden_SH = trunk(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
        pooled_H = hidden_SH[-1] if pooling == "last" else sum(hidden_SH) / len(hidden_SH)
        scores.append(state["out_proj.weight"][0] @ pooled_H + state["out_proj.bias"][0])
    return torch.stack(scores)


def sequences() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(4, VOCABULARY, length).astype(np.int32) for length in (7, 1, 12, 2)]


def service_scores(path: str) -> torch.Tensor:
    with torch.no_grad():
        model = load_reward_model(path)
        return sequence_scores(model, *pad_sequences(sequences())) - reward_offset(model)


class Released:
    """A folder as published, and what its scores must be."""

    def __init__(self, folder: Path, pooling: str, safetensors: bool) -> None:
        self.path, self.pooling = str(folder), pooling
        self.expected = literal_scores(write_folder(folder, pooling=pooling, safetensors=safetensors), pooling, sequences())


@pytest.fixture(scope="module", params=["last-bin", "last-safetensors", "mean-bin", "mean-safetensors"])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Released:
    pooling, kind = request.param.split("-")
    return Released(tmp_path_factory.mktemp("models") / "oasst-rm", pooling, kind == "safetensors")


def test_scores_are_open_assistants(released: Released) -> None:
    assert released.expected.std() > 0.05
    torch.testing.assert_close(service_scores(released.path), released.expected, atol=1e-5, rtol=0)
    assert reward_offset(load_reward_model(released.path)) == -BIAS


def test_the_scoring_service_takes_the_folder(released: Released) -> None:
    scores = ScoringModel(released.path, kind_of(released.path)).answers(sequences(), max_batch_tokens=64)
    torch.testing.assert_close(torch.from_numpy(np.concatenate(scores)), released.expected, atol=1e-5, rtol=0)


def test_conversion_writes_an_ordinary_folder(released: Released, tmp_path: Path) -> None:
    convert_reward_model(released.path, tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert config["model_type"] == "gpt_neox"
    assert config["architectures"] == ["GPTNeoXForSequenceClassification"]
    assert config["pooling"] == released.pooling
    assert config["reward_offset"] == -BIAS
    check_model_folder(tmp_path / "rm")
    torch.testing.assert_close(service_scores(str(tmp_path / "rm")), released.expected, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert build_template("auto", tokenizer).name == "oasst"
    plain, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if released.pooling == "last":
        ids_BS, attention_BS = pad_sequences(sequences())
        padded = ids_BS.masked_fill(~attention_BS, plain.config.pad_token_id)
        with torch.no_grad():
            logits = plain.eval()(padded, attention_mask=attention_BS).logits[:, 0]
        torch.testing.assert_close(logits + BIAS, released.expected, atol=1e-5, rtol=0)


def test_a_critic_starts_as_the_scorer(released: Released) -> None:
    critic = ValueModel.from_reward_model(released.path).eval()
    ids_BS, attention_BS = pad_sequences(sequences())
    with torch.no_grad():
        last = critic(ids_BS, attention_BS)[torch.arange(4), attention_BS.sum(1) - 1]
    torch.testing.assert_close(last, released.expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_training_goes_on_from_it(released: Released, tmp_path: Path) -> None:
    assert not writes_text(released.path)
    path = resolve_model(ModelConfig(path=released.path), texts=[], seed=1, folder=tmp_path, for_oasst=False)
    assert build_template("auto", load_tokenizer(path)).name == "oasst"
    model = init_reward_model(path, seed=0, pooling=released.pooling)
    raw = sequence_scores(model, *pad_sequences(sequences()))
    torch.testing.assert_close(raw, released.expected - BIAS, atol=1e-5, rtol=0)
    assert reward_offset(model) == 0.0
    other = {"last": "mean", "mean": "last"}[released.pooling]
    with pytest.raises(ModelError, match=f"trained with pooling = {released.pooling}"):
        init_reward_model(path, seed=0, pooling=other)


def test_the_config_is_read_like_any_other(released: Released) -> None:
    config = load_config(released.path)
    assert config.get_text_config().max_position_embeddings == CONTEXT
    assert config.classifier_dropout == 0.0
    check_model_folder(released.path, chat_template=False)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    state = write_folder(tmp_path / "rm", pooling="last", safetensors=False)
    del state["out_proj.bias"]
    torch.save(state, tmp_path / "rm" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no weights for out_proj\.bias"):
        load_reward_model(str(tmp_path / "rm"))
