"""What scoring computes, wherever it runs: token ids in, scores or log-probs out, in padded passes of sequences of similar length.

Shape legend: B sequences of a pass, S tokens of the longest, R = S - 1 predicted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from app.config.serving import ModelKind
from app.errors import ScoringError
from app.experience import FloatArray, IntArray
from app.models.forward import pad_sequences, padded_batches, sequence_logprobs
from app.models.heads import Precision, load_reward_model, reward_offset, sequence_scores
from app.models.load import load_causal_lm, writes_text


def kind_of(path: str) -> ModelKind:
    """What a folder is served as: a language model gives log-probs, a reward model scores. Raises ModelError."""
    return "reference" if writes_text(path) else "reward"


class ScoringModel:
    """A loaded model. reward: logit - reward_offset of each sequence, float32 [1]; reference: log p(ids[t+1] | ids[..t]) of its
    tokens after the first, of logits divided by `temperature`, float32 [s - 1]. Raises ModelError."""

    def __init__(
        self,
        path: str,
        kind: ModelKind,
        *,
        precision: Precision = "fp32",
        trust_remote_code: bool = False,
        temperature: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if kind == "reward":
            self.model = load_reward_model(path, precision=precision, trust_remote_code=trust_remote_code)
        else:
            self.model = load_causal_lm(path, precision, trust_remote_code)
        torch.nn.Module.to(self.model, device)  # in place
        self._path, self._kind, self._temperature, self._device = path, kind, temperature, device

    def answers(
        self, sequences: Sequence[IntArray], max_batch_tokens: int, on_pass: Callable[[int], None] = lambda rows: None
    ) -> list[FloatArray]:
        """One array per sequence, in their order. `on_pass` is told how many sequences each pass answered. Raises ScoringError
        where an answer is not finite."""
        answers: dict[int, FloatArray] = {}
        for rows in padded_batches(sequences, max_batch_tokens):
            ids_BS, attention_BS = pad_sequences([sequences[row] for row in rows], self._device)
            answers.update(zip(rows, self.forward(ids_BS, attention_BS), strict=True))
            on_pass(len(rows))
        if not all(np.isfinite(answer).all() for answer in answers.values()):
            raise ScoringError(f"{self._path}: computed NaN or infinity; check the model folder, or use --model.precision=fp32")
        return [answers[row] for row in range(len(sequences))]

    @torch.inference_mode()
    def forward(self, ids_BS: torch.Tensor, attention_BS: torch.Tensor) -> list[FloatArray]:
        """Answers of one padded pass."""
        if self._kind == "reward":
            scores_B = sequence_scores(self.model, ids_BS, attention_BS) - reward_offset(self.model)
            return list(scores_B[:, None].cpu().numpy())
        logprobs_BR = sequence_logprobs(self.model, ids_BS, attention_BS, temperature=self._temperature).cpu().numpy()
        return [row[: length - 1] for row, length in zip(logprobs_BR, attention_BS.sum(-1).tolist(), strict=True)]
