"""The policy as the learner trains it: log-probs of the response tokens only.

Shape legend: B rows, S sequence, T response tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from app.models.forward import hidden_states
from app.numerics.logprobs import entropy, label_logprobs


def states_before(prompt_lengths_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Index into [.., S] of the state that predicts each response token, int64 [B, T]; masked entries point at the row's last one."""
    steps_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B1 = (mask_BT.sum(1, keepdim=True) - 1).clamp(min=0)
    return prompt_lengths_B[:, None] - 1 + torch.minimum(steps_T, last_B1)


class PolicyModel(nn.Module):
    """A causal language model whose forward gives what a policy loss needs; its output head runs on response tokens only."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        ids_BS: torch.Tensor,
        attention_BS: torch.Tensor,
        prompt_lengths_B: torch.Tensor,
        mask_BT: torch.Tensor,
        temperature: float,
        entropy_gradient: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the response tokens, and the entropy of the distributions they were drawn from; float32 [B, T], 0 where
        masked. Logits are divided by `temperature`, as the rollout engine does.

        entropy_gradient: whether the entropy is more than a metric; without, the logits go as soon as the log-probs have theirs."""
        hidden_BSH = hidden_states(self.language_model.base_model, ids_BS, attention_BS)
        before_BT = states_before(prompt_lengths_B, mask_BT)
        rows_B1 = torch.arange(len(ids_BS), device=ids_BS.device)[:, None]
        logits_BTV = self.language_model.get_output_embeddings()(hidden_BSH[rows_B1, before_BT])
        logprobs_BT = label_logprobs(logits_BTV, ids_BS.gather(1, before_BT + 1), temperature)
        entropy_BT = entropy(logits_BTV if entropy_gradient else logits_BTV.detach(), temperature)
        return logprobs_BT.masked_fill(~mask_BT, 0.0), entropy_BT.masked_fill(~mask_BT, 0.0)
