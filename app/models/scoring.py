"""What scoring computes, wherever it runs: token ids in, scores, log-probs or logits out.

The sequences of a pass stand behind each other in one row, where the model can attend to each of them by itself, and what several begin
with is computed once; otherwise they are padded, those of similar length together.

Shape legend: B sequences of a pass, S tokens of the longest, R = S - 1 predicted tokens, V vocabulary; M tokens of all sequences,
P = M - B predicted ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from app.config.serving import OUTPUTS, ModelKind, Output
from app.errors import ModelError, ScoringError
from app.experience import IntArray
from app.models.forward import (
    LOGITS_PER_CHUNK,
    packed_logprobs,
    pad_sequences,
    padded_batches,
    positions,
    sequence_logprobs,
)
from app.models.heads import Precision, has_score_head, load_reward_model, packed_scores, reward_offset, sequence_scores
from app.models.load import load_causal_lm, scores_text, writes_text
from app.models.packed import pack_sequences, packed_batches
from app.models.segments import attend_by_segment

Answer = np.ndarray[Any, np.dtype[Any]]


def kind_of(path: str) -> ModelKind:
    """What a folder is served as: a language model gives log-probs, a reward model scores. Raises ModelError."""
    if scores_text(path):
        return "reward"
    if writes_text(path):
        return "reference"
    raise ModelError(f"{path}: an encoder without a score head; train a reward model from it with `corral rm`")


WHERE_IT_CAME_FROM = ("_name_or_path", "transformers_version")
"""Entries of a model's configuration that say nothing about what it computes."""


class ScoringModel:
    """A loaded model, in evaluation mode. Raises ModelError. `packs`: whether its passes hold no padding.

    What it gives for a sequence of s tokens, by output: rewards, float32 [1], logit - reward_offset; logprobs, float32 [s - 1],
    log p(ids[t+1] | ids[..t]) of logits divided by `temperature`; logits, float16 [s, V].
    """

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
        self.path, self.kind = path, kind
        own_head = kind == "reward" and not has_score_head(self.model)  # an encoder's, which looks for its first token in every row
        self.packs = not own_head and attend_by_segment(self.model)
        config = self.model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._temperature, self._device = temperature, device

    @cached_property
    def weights_hash(self) -> str:
        """32 hex digits over the configuration and the names, types and values of all weights as loaded: about 1 s per GB."""
        digest = hashlib.blake2b(_settings(self.model), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def answers(
        self,
        sequences: Sequence[IntArray],
        max_batch_tokens: int,
        on_pass: Callable[[int], None] = lambda rows: None,
        *,
        output: Output | None = None,
        on_padding: Callable[[int], None] = lambda tokens: None,
    ) -> list[Answer]:
        """One array per sequence, in their order; `output` defaults to the kind's own. `on_pass` is told how many sequences each pass
        answered, `on_padding` how many tokens of it were padding. Raises ScoringError where an answer is not finite."""
        output = output or OUTPUTS[self.kind][0]
        if output == "logits":  # which are as large as log-probs are small
            max_batch_tokens = min(max_batch_tokens, max(1, LOGITS_PER_CHUNK // self.vocabulary))
        answers: dict[int, Answer] = {}
        for rows in (packed_batches if self.packs else padded_batches)(sequences, max_batch_tokens):
            together = [sequences[row] for row in rows]
            answers.update(
                zip(rows, self._packed_pass(together, output) if self.packs else self._padded_pass(together, output), strict=True)
            )
            on_pass(len(rows))
            on_padding(0 if self.packs else len(rows) * max(map(len, together)) - sum(map(len, together)))
        if not all(np.isfinite(answer).all() for answer in answers.values()):
            raise ScoringError(f"{self.path}: computed NaN or infinity; check the model folder, or use --model.precision=fp32")
        return [answers[row] for row in range(len(sequences))]

    @torch.inference_mode()
    def _packed_pass(self, sequences: Sequence[IntArray], output: Output) -> list[Answer]:
        row = pack_sequences(sequences, self._device)
        if output == "rewards":
            scores_B = packed_scores(self.model, row) - reward_offset(self.model)
            return list(scores_B[:, None].cpu().numpy())
        if output == "logprobs":
            logprobs_P = packed_logprobs(self.model, row, temperature=self._temperature).cpu().numpy()
            return np.split(logprobs_P, np.cumsum(row.lengths)[:-1] - np.arange(1, len(row.lengths)))
        logits_MV = row.of_tokens(self.model(**row.inputs).logits[0].half()).cpu()
        return [logits.numpy() for logits in logits_MV.split(row.lengths)]

    @torch.inference_mode()
    def _padded_pass(self, sequences: Sequence[IntArray], output: Output) -> list[Answer]:
        ids_BS, attention_BS = pad_sequences(sequences, self._device)
        lengths = [len(ids) for ids in sequences]
        if output == "rewards":
            scores_B = sequence_scores(self.model, ids_BS, attention_BS) - reward_offset(self.model)
            return list(scores_B[:, None].cpu().numpy())
        if output == "logprobs":
            logprobs_BR = sequence_logprobs(self.model, ids_BS, attention_BS, temperature=self._temperature).cpu().numpy()
            return [row[: length - 1] for row, length in zip(logprobs_BR, lengths, strict=True)]
        logits_BSV = self.model(input_ids=ids_BS, attention_mask=attention_BS, position_ids=positions(attention_BS), use_cache=False).logits
        return [row[:length].half().cpu().numpy() for row, length in zip(logits_BSV, lengths, strict=True)]


def _settings(model: PreTrainedModel) -> bytes:
    """The model's configuration, as bytes that are the same wherever it was loaded."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in WHERE_IT_CAME_FROM}
    return json.dumps(config, sort_keys=True, default=str).encode()
