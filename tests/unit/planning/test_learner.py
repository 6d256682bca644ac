"""What passes through a learner's models: logits beside what autograd holds, and passes bounded by tokens."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.models.policy import PolicyModel
from app.numerics import logprobs
from app.planning.memory import layer_activations
from app.planning.roles import Roles
from app.planning.shapes import SHAPES


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations have made and that are still there, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("coef", [0.0, 0.01])
def test_logits_of_a_policy_take_what_a_backward_pass_holds(coef: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an entropy bonus a second gradient of the logits is there before autograd adds the two up."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 2**10)
    rows, prompt, answer, vocabulary = 4, 4, 60, 4096
    sizes = {"vocab_size": vocabulary, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    policy = PolicyModel(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0)))
    policy.requires_grad_(False).language_model.base_model.layers[0].requires_grad_(True)  # no gradient as large as the logits
    ids = torch.zeros(rows, prompt + answer, dtype=torch.long)
    inputs = ids, torch.ones_like(ids), torch.full((rows,), prompt), torch.ones(rows, answer, dtype=torch.bool), 1.0
    policy(*inputs)  # finds out how the model makes its logits
    with LiveBytes() as live:
        logprobs_BT, entropy_BT, _ = policy(*inputs, entropy_gradient=coef > 0)
        loss = -logprobs_BT.sum() - coef * entropy_BT.sum()
        del logprobs_BT, entropy_BT
        loss.backward()
    recipe = with_values(
        Recipe(),
        {
            "model.path": "pythia-70m",
            "reward.path": "pythia-70m",
            "ppo.algorithm.entropy_coef": coef,
            "ppo.micro_batch_size": rows,
            "data.max_prompt_length": prompt,
            "rollout.max_new_tokens": answer,
        },
    )
    expected = Roles(recipe).learner().working["logits"] * vocabulary / SHAPES["pythia-70m"].vocabulary
    assert live.peak == pytest.approx(expected, rel=0.1)


def test_a_pass_bounded_by_tokens_is_as_large_as_they_allow() -> None:
    """Also where they are no multiple of the longest sequence, and where a group of replies is longer than they are."""
    values = {"model.path": "pythia-70m", "reward.path": "pythia-70m", "data.max_length": 1024, "ppo.critic_model": "value_head"}
    layer = layer_activations(SHAPES["pythia-70m"], 4)

    def tokens(command: str, **settings: object) -> float:
        roles = Roles(with_values(Recipe(), values | {key.replace("__", "."): value for key, value in settings.items()}))
        role = roles.learner() if command == "ppo" else roles.trainers(command, roles.recipe.sft if command == "sft" else roles.recipe.rm)
        return role.working["activations"] / (SHAPES["pythia-70m"].layers * layer)

    for stage in ("sft", "rm"):
        assert tokens(stage, **{f"{stage}__micro_batch_tokens": 7 * 1024}) == pytest.approx(
            tokens(stage, **{f"{stage}__micro_batch_tokens": 7 * 1024 - 1}), rel=0.01
        )
        few = tokens(stage, **{f"{stage}__micro_batch_tokens": 1, f"{stage}__batch_size": 1, f"{stage}__micro_batch_size": 1})
        assert few == pytest.approx(tokens(stage, **{f"{stage}__batch_size": 1, f"{stage}__micro_batch_size": 1}))
    ppo = {"ppo__batch_size": 64, "data__max_prompt_length": 64, "rollout__max_new_tokens": 64, "ppo__epochs": 1}
    for reuse in (False, True):
        by_rows = tokens("ppo", **ppo, ppo__micro_batch_size=16, ppo__reuse_forward=reuse)
        assert tokens("ppo", **ppo, ppo__micro_batch_tokens=16 * 128, ppo__reuse_forward=reuse) == pytest.approx(by_rows, rel=0.15)
