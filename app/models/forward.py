"""Forward passes that never hold [B, S, V] logits: batching by length, hidden states, per-token log-probs.

Shape legend: B sequences, S tokens of the longest, R = S - 1 predicted tokens (entry t belongs to token t + 1),
H hidden size, V vocabulary, N tokens picked out of [B, R], n of them in one chunk; packed rows as in app.models.packed.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from app.experience import IntArray
from app.models.logits import logits_of
from app.models.packed import PackedRow, pack_sequences, packed_hidden_states
from app.models.segments import BY_SEGMENT, segments_of
from app.numerics.logprobs import label_logprobs

LOGITS_PER_CHUNK = 2**25
"""Default size of one chunk of logits, tokens x vocabulary: 128 MiB in float32."""


def padded_batches(sequences: Sequence[Sized], max_tokens: int) -> list[list[int]]:
    """Group sequences of similar length, so that rows x longest row <= max_tokens in every group.

    Returns index lists, longest sequences first; together they name every sequence once. A sequence longer than
    max_tokens is a group of its own.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    batches: list[list[int]] = []
    for index in order:
        if batches and len(sequences[batches[-1][0]]) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad_sequences(sequences: Sequence[IntArray], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad int arrays [s_b]: ids_BS int64 (token 0 behind each row's end) and attention_BS bool."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids_BS = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, sequence in zip(ids_BS, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence.astype("int64"))
    attention_BS = torch.arange(ids_BS.shape[1]) < lengths[:, None]
    return ids_BS.to(device), attention_BS.to(device)


def positions(attention_BS: torch.Tensor) -> torch.Tensor:
    """Position of each attended token among the attended ones of its row, int64 [B, S]; 0 on leading padding."""
    return (attention_BS.long().cumsum(-1) - 1).clamp(min=0)


def hidden_states(trunk: nn.Module, ids_BS: torch.Tensor, attention_BS: torch.Tensor) -> torch.Tensor:
    """Final hidden states [B, S, H] of a decoder without its head, independent of how the rows are padded.

    With attention by segment (see app.models.segments) padding is not computed, and its states are 0; what several rows begin with is
    computed once.
    """
    if getattr(trunk.config, "_attn_implementation", None) == BY_SEGMENT:
        return _packed_hidden_states(trunk, ids_BS, attention_BS.bool())
    output = trunk(input_ids=ids_BS, attention_mask=attention_BS, position_ids=positions(attention_BS), use_cache=False)
    return output.last_hidden_state


def _packed_hidden_states(trunk: nn.Module, ids_BS: torch.Tensor, attention_BS: torch.Tensor) -> torch.Tensor:
    """All rows behind each other in one, without their padding."""
    rows = zip(ids_BS.cpu().numpy(), attention_BS.cpu().numpy(), strict=True)
    row = pack_sequences([ids[attended] for ids, attended in rows if attended.any()], ids_BS.device)
    hidden_MH = row.of_tokens(packed_hidden_states(trunk, row))
    blank_BSH = hidden_MH.new_zeros(*ids_BS.shape, hidden_MH.shape[-1])
    return blank_BSH.masked_scatter(attention_BS[..., None], hidden_MH)


def sequence_logprobs(
    model: PreTrainedModel,
    ids_BS: torch.Tensor,
    attention_BS: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Log p(ids[t+1] | ids[..t]) at a temperature, float32 [B, R]; 0 where token t or t + 1 is not attended.

    The head runs over at most `chunk_tokens` tokens at a time (default: LOGITS_PER_CHUNK / V), and not at all on padding.
    """
    config = model.config.get_text_config()
    chunk = chunk_tokens or max(1, LOGITS_PER_CHUNK // config.vocab_size)
    pick_BR = attention_BS[:, 1:].bool() & attention_BS[:, :-1].bool()
    blank_BR = torch.zeros(pick_BR.shape, dtype=torch.float32, device=ids_BS.device)
    if not pick_BR.any():
        return blank_BR
    hidden_NH = hidden_states(model.base_model, ids_BS, attention_BS)[:, :-1][pick_BR]
    return blank_BR.masked_scatter(pick_BR, _logprobs(model, hidden_NH, ids_BS[:, 1:][pick_BR], temperature, chunk))


def packed_logprobs(model: PreTrainedModel, row: PackedRow, *, temperature: float = 1.0, chunk_tokens: int | None = None) -> torch.Tensor:
    """The same of each sequence of a row, float32 [P], one sequence behind the other: P = M - B tokens that another one predicts."""
    vocabulary = model.config.get_text_config().vocab_size
    chunk = chunk_tokens or max(1, LOGITS_PER_CHUNK // vocabulary)
    ids_N = row.ids_1N[0]
    states_M, ids_M = row.of_tokens(torch.arange(len(ids_N), device=ids_N.device)), row.of_tokens(ids_N)
    predicts_M = torch.ones_like(ids_M, dtype=torch.bool)
    predicts_M[row.ends_B] = False
    pairs_P = states_M[predicts_M] * vocabulary + ids_M.roll(-1)[predicts_M]
    pairs_N, which_P = pairs_P.unique(return_inverse=True)  # shared tokens predict the same ones
    hidden_NH = packed_hidden_states(model.base_model, row)[pairs_N // vocabulary]
    return _logprobs(model, hidden_NH, pairs_N % vocabulary, temperature, chunk)[which_P]


def _logprobs(model: PreTrainedModel, hidden_NH: torch.Tensor, targets_N: torch.Tensor, temperature: float, chunk: int) -> torch.Tensor:
    """Log-probs [N] of the targets, by `chunk` tokens at a time."""
    pieces = zip(hidden_NH.split(chunk), targets_N.split(chunk), strict=True)
    return torch.cat(
        [label_logprobs(logits_of(model, hidden_nH)[None], targets_n[None], temperature)[0] for hidden_nH, targets_n in pieces]
    )


def target_logits(
    model: PreTrainedModel, ids_BS: torch.Tensor, positions_BS: torch.Tensor, targets_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] of the target tokens, each given the tokens before it in its own sequence, and their ids [N]; in row-major order.

    positions_BS restarts at 0 where a sequence begins, and a row may hold several: attention stays within each. Padding may only
    stand behind a row's last sequence, so that causal attention needs no mask. The head runs on what predicts a target alone.
    """
    inputs: dict[str, Any] = {"use_cache": False}
    if model.config._attn_implementation == BY_SEGMENT:  # all in one row: a row's first token is no target, so rows can follow on
        ids_BS, positions_BS, targets_BS = (x.reshape(1, -1) for x in (ids_BS, positions_BS, targets_BS))
        inputs["segments"] = segments_of(positions_BS[0])
    inputs |= {"input_ids": ids_BS, "position_ids": positions_BS}
    pick_BR = targets_BS[:, 1:]
    return logits_of(model, model.base_model(**inputs).last_hidden_state[:, :-1][pick_BR]), ids_BS[:, 1:][pick_BR]
