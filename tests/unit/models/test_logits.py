"""What architectures do between output head and logits: found out, for every path that computes log-probs, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

from app.errors import ModelError
from app.models.forward import sequence_logprobs
from app.models.load import load_causal_lm
from app.models.logits import learn_logits, logits_of
from app.models.policy import PolicyModel
from tests.tiny_models import make_neox

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "attn_logit_softcapping": None},
    "recurrent_gemma": {"logits_soft_cap": 0.5, "lru_width": 32, "attention_window_size": 64},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0},
    "llama": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "logit_scale": 0.25},
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | ARCHITECTURES[name])).eval()
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logprobs_are_those_of_the_models_own_logits(name: str) -> None:
    model = model_of(name)
    ids_BS = torch.tensor([[5, 6, 7, 8, 9, 10]])
    logits_BSV = model(input_ids=ids_BS).logits
    expected_BR = logits_BSV[:, :-1].log_softmax(-1).gather(-1, ids_BS[:, 1:, None])[..., 0]
    everywhere_BS, one = torch.ones_like(ids_BS, dtype=torch.bool), torch.ones(1, dtype=torch.long)
    torch.testing.assert_close(sequence_logprobs(model, ids_BS, everywhere_BS), expected_BR, atol=1e-5, rtol=0)
    logprobs_BT, entropy_BT, _ = PolicyModel(model)(ids_BS, everywhere_BS, one, everywhere_BS[:, 1:], 1.0)
    torch.testing.assert_close(logprobs_BT, expected_BR, atol=1e-5, rtol=0)
    probabilities = logits_BSV[:, :-1].softmax(-1)
    torch.testing.assert_close(entropy_BT, -(probabilities * probabilities.log()).sum(-1), atol=1e-5, rtol=0)


class Strange(GPTNeoXForCausalLM):
    """Its logits are not what any config says."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits = output.logits**3
        return output


def test_an_architecture_that_does_something_unknown_is_refused(tmp_path: Path) -> None:
    model = Strange.from_pretrained(make_neox(tmp_path))
    with pytest.raises(ModelError, match=r"Strange does something unknown between its output head and its logits.*another architecture"):
        learn_logits(model)
    with pytest.raises(ModelError):
        logits_of(model, torch.zeros(1, 64))


@torch.no_grad()
def test_capped_attention_is_not_left_out(tmp_path: Path) -> None:
    """torch's own attention knows no cap, and Transformers lets it compute without."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=0.05, attn_implementation="eager")
    capped = AutoModelForCausalLM.from_config(config).eval()
    capped.save_pretrained(tmp_path)
    ids_BS = torch.arange(3, 13)[None]
    torch.testing.assert_close(load_causal_lm(tmp_path)(input_ids=ids_BS).logits, capped(input_ids=ids_BS).logits)
