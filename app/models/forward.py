"""Forward passes that never hold [B, S, V] logits: batching by length, hidden states, per-token log-probs.

Shape legend: B sequences, S tokens of the longest, R = S - 1 predicted tokens (entry t belongs to token t + 1),
H hidden size, V vocabulary, N tokens picked out of [B, R], n of them in one chunk; packed rows as in app.models.packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from app.experience import IntArray
from app.models.packed import PackedRow, pack_sequences, packed_hidden_states
from app.models.segments import BY_SEGMENT, segments_of
from app.numerics.logprobs import label_logprobs

LOGITS_PER_CHUNK = 2**25
"""Default size of one chunk of logits, tokens x vocabulary: 128 MiB in float32."""

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Config keys of architectures that change the head's output before they call it logits (Gemma, Cohere, Granite, Falcon-H1)."""


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
    pieces = (_logits_by_rows if transforms_logits(model) else _logits_by_tokens)(model, ids_BS, attention_BS, pick_BR, chunk)
    logprobs = [label_logprobs(logits_nV[None], targets_n[None], temperature)[0] for logits_nV, targets_n in pieces]
    return blank_BR.masked_scatter(pick_BR, torch.cat(logprobs))


def packed_logprobs(model: PreTrainedModel, row: PackedRow, *, temperature: float = 1.0, chunk_tokens: int | None = None) -> torch.Tensor:
    """The same of each sequence of a row, float32 [P], one sequence behind the other: P = M - B tokens that another one predicts.

    For models whose logits are what the output head gives (see `transforms_logits`).
    """
    vocabulary = model.config.get_text_config().vocab_size
    chunk = chunk_tokens or max(1, LOGITS_PER_CHUNK // vocabulary)
    ids_N = row.ids_1N[0]
    states_M, ids_M = row.of_tokens(torch.arange(len(ids_N), device=ids_N.device)), row.of_tokens(ids_N)
    predicts_M = torch.ones_like(ids_M, dtype=torch.bool)
    predicts_M[row.ends_B] = False
    pairs_P = states_M[predicts_M] * vocabulary + ids_M.roll(-1)[predicts_M]
    pairs_N, which_P = pairs_P.unique(return_inverse=True)  # shared tokens predict the same ones
    hidden_NH = packed_hidden_states(model.base_model, row)[pairs_N // vocabulary]
    head = model.get_output_embeddings()
    pieces = zip(hidden_NH.split(chunk), (pairs_N % vocabulary).split(chunk), strict=True)
    logprobs = [label_logprobs(head(hidden_nH)[None], targets_n[None], temperature)[0] for hidden_nH, targets_n in pieces]
    return torch.cat(logprobs)[which_P]


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
    if transforms_logits(model):
        logits_NV = model(**inputs).logits[:, :-1][pick_BR]
    else:
        logits_NV = model.get_output_embeddings()(model.base_model(**inputs).last_hidden_state[:, :-1][pick_BR])
    return logits_NV, ids_BS[:, 1:][pick_BR]


def transforms_logits(model: PreTrainedModel) -> bool:
    """Whether logits are more than what the output head gives."""
    config = model.config.get_text_config()
    return any(getattr(config, key, None) not in (None, 1.0) for key in LOGIT_TRANSFORMS)


Pieces = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Logits [n, V] and target ids [n] of the picked entries, in row-major order."""


def _logits_by_tokens(
    model: PreTrainedModel, ids_BS: torch.Tensor, attention_BS: torch.Tensor, pick_BR: torch.Tensor, chunk: int
) -> Pieces:
    """The trunk once, then the model's own head over `chunk` picked tokens at a time."""
    head = model.get_output_embeddings()
    hidden_NH = hidden_states(model.base_model, ids_BS, attention_BS)[:, :-1][pick_BR]
    for hidden_nH, targets_n in zip(torch.split(hidden_NH, chunk), torch.split(ids_BS[:, 1:][pick_BR], chunk), strict=True):
        yield head(hidden_nH), targets_n


def _logits_by_rows(model: PreTrainedModel, ids_BS: torch.Tensor, attention_BS: torch.Tensor, pick_BR: torch.Tensor, chunk: int) -> Pieces:
    """The model's whole forward over as many rows as `chunk` tokens allow: for logits that are more than the head's output."""
    rows = max(1, chunk // ids_BS.shape[1])
    for ids, attention, pick in zip(*(torch.split(x, rows) for x in (ids_BS, attention_BS, pick_BR)), strict=True):
        if not pick.any():
            continue
        logits = model(input_ids=ids, attention_mask=attention, position_ids=positions(attention), use_cache=False).logits
        yield logits[:, :-1][pick], ids[:, 1:][pick]
