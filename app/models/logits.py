"""Logits of hidden states, as the model itself would compute them: the output head, and what some architectures do behind it.

A model's own forward gives logits of whole rows; losses, log-probs and entropies need those of a few tokens. What stands between head
and logits is named by no interface, and one key of a config means different things (Granite divides by `logits_scaling`, HyperCLOVA X
multiplies), so it is found by trying: two tokens go through the model once.

Shape legend: H hidden size, V vocabulary; ... any leading sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from app.errors import ModelError
from app.models.segments import BY_SEGMENT, Segment

Transform = Callable[[torch.Tensor], torch.Tensor]


def _as_it_is(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _capped(logits: torch.Tensor, value: float) -> torch.Tensor:
    return torch.tanh(logits / value) * value


def _divided(logits: torch.Tensor, value: float) -> torch.Tensor:
    return logits / value


def _multiplied(logits: torch.Tensor, value: float) -> torch.Tensor:
    return logits * value


TRANSFORMS = {
    "final_logit_softcapping": (_capped,),  # Gemma
    "logits_soft_cap": (_capped,),  # RecurrentGemma
    "logit_scale": (_multiplied,),  # Cohere; MPT has the key and does nothing with it
    "logits_scaling": (_divided, _multiplied),  # Granite, MiniCPM; HyperCLOVA X
    "lm_head_multiplier": (_multiplied,),  # Falcon-H1
}
"""By the config's key: what may be done with its value."""

LEARNT = "corral_logit_transform"
"""Attribute of a model under which what was found is kept."""


def logits_of(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] of final hidden states [..., H], which are those of `model.base_model`. Raises ModelError (see `learn_logits`)."""
    if not hasattr(model, LEARNT):
        learn_logits(model)
    logits: torch.Tensor = getattr(model, LEARNT)(model.get_output_embeddings()(states))
    return logits


def learn_logits(model: PreTrainedModel) -> None:
    """Find out how `model` makes its logits, and keep it with the model. Raises ModelError where that is nothing known."""
    with torch.no_grad():
        states, own = _two_tokens(model)
        output = model.get_output_embeddings()(states)
        for transform in _candidates(model.config.get_text_config()):
            logits = transform(output)
            if logits.shape == own.shape and torch.allclose(logits.float(), own.float(), rtol=1e-5, atol=1e-6, equal_nan=True):
                setattr(model, LEARNT, transform)
                return
    raise ModelError(
        f"model {model.config.name_or_path}: {type(model).__name__} does something unknown between its output head and its logits, so "
        "that log-probs of single tokens would be wrong; take a model of another architecture"
    )


def _two_tokens(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states [1, 2, H] of two tokens and the logits [1, 2, V] that the model makes of them."""
    outputs: list[Any] = []
    inputs: dict[str, Any] = {"input_ids": torch.arange(2, device=model.device)[None], "use_cache": False}
    if model.config._attn_implementation == BY_SEGMENT:
        inputs["segments"] = [Segment(2)]
    hook = model.base_model.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    return outputs[-1].last_hidden_state, logits


def _candidates(config: Any) -> Iterator[Transform]:
    yield _as_it_is
    for key, transforms in TRANSFORMS.items():
        value = getattr(config, key, None)
        if isinstance(value, (int, float)) and value:
            yield from (partial(transform, value=value) for transform in transforms)
