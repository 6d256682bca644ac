"""The policy as the learner trains it: log-probs of the response tokens only.

Shape legend: B rows, S sequence, T response tokens, N of them that are not masked, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from app.models.forward import hidden_states
from app.models.logits import logits_of
from app.numerics.logprobs import entropy, label_logprobs


def states_before(prompt_lengths_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Index into [.., S] of the state that predicts each response token, int64 [B, T]; masked entries point at the row's last one."""
    steps_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B1 = (mask_BT.sum(1, keepdim=True) - 1).clamp(min=0)
    return prompt_lengths_B[:, None] - 1 + torch.minimum(steps_T, last_B1)


class PolicyModel(nn.Module):
    """A causal language model whose forward gives what a policy loss needs; its output head runs on response tokens only.

    value_head: a critic that reads the same states as the output head, so that one pass through the trunk gives both.
    """

    def __init__(self, language_model: PreTrainedModel, value_head: nn.Module | None = None) -> None:
        super().__init__()
        self.language_model = language_model
        self.value_head = value_head

    def forward(
        self,
        ids_BS: torch.Tensor,
        attention_BS: torch.Tensor,
        prompt_lengths_B: torch.Tensor,
        mask_BT: torch.Tensor,
        temperature: float,
        entropy_gradient: bool = False,
        frozen: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Log-probs of the response tokens, the entropy of the distributions they were drawn from, and the values of the states before
        them (None without a value head); float32 [B, T], 0 where masked. Logits are divided by `temperature`, as the rollout engine does.

        entropy_gradient: whether the entropy is more than a metric; without, the logits go as soon as the log-probs have theirs.
        frozen: nothing but the value head gets gradients."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            hidden_BSH = hidden_states(self.language_model.base_model, ids_BS, attention_BS)
            before_BT = states_before(prompt_lengths_B, mask_BT)
            rows_B1 = torch.arange(len(ids_BS), device=ids_BS.device)[:, None]
            picked_NH, labels_N = hidden_BSH[rows_B1, before_BT][mask_BT], ids_BS.gather(1, before_BT + 1)[mask_BT]
            logits_1NV = logits_of(self.language_model, picked_NH)[None]
            logprobs_N = label_logprobs(logits_1NV, labels_N[None], temperature)[0]
            entropy_N = entropy(logits_1NV if entropy_gradient else logits_1NV.detach(), temperature)[0]

        def spread(x_N: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(mask_BT, dtype=x_N.dtype).masked_scatter(mask_BT, x_N)

        return spread(logprobs_N), spread(entropy_N), None if self.value_head is None else spread(self.value_head(picked_NH))
