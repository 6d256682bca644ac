"""Rollouts kept for later: one parquet file per PPO step, with everything that its credit was computed from.

Shape legend: B rollouts, P prompt tokens, T response tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from app.config.ppo import PpoConfig
from app.durable import writing
from app.errors import CheckpointError, ConfigError, first_line
from app.experience import DoubleArray, Experience, FinishReason, IntArray, Prompt, Rollout, Scores, TokenBatch, pad_rows, prompt_groups
from app.run_layout import SAVING

FACTS = b"corral"
"""Key of the file's metadata that holds what is the same for all rows, as JSON."""

INPUTS = ("behaviour", "proximal", "reference", "values")
RESULTS = ("rewards", "advantages", "returns")
"""Columns with one float32 per response token. The inputs are as the models gave them (values: null without a critic); the results
are empty in masked rows."""

PART, STEP = "score/", re.compile(r"step-(\d+)\.parquet")


@dataclass(frozen=True)
class Batch:
    """One step's batch as it goes into credit. version: of the learner's weights; credit: the other arguments of credit."""

    step: int
    version: int
    rollouts: Sequence[Rollout]
    scores: Scores
    experience: Experience
    credit: Mapping[str, float]


@dataclass(frozen=True)
class RolloutRecorder:
    """Writes `FOLDER/step-00000012.parquet` and keeps the newest `ppo.keep_rollouts` of them. decode: response ids -> text."""

    folder: Path
    config: PpoConfig
    decode: Callable[[IntArray], str]
    pad_id: int

    def write(self, batch: Batch, credited: Experience) -> None:
        """Record a step, in place of what an earlier session left of it and of later ones.

        credited: the experience after credit; where that has failed, the batch's own, and its results are null. Raises DiskError."""
        if not self.config.keep_rollouts:
            return
        step = batch.step
        facts = {
            "step": step,
            "version": batch.version,
            "pad_id": self.pad_id,
            "credit": dict(batch.credit),
            "held_out": sorted(batch.scores.held_out),
            "config": self.config.model_dump(mode="json"),
        }
        table = pa.table(self._columns(batch, credited), metadata={FACTS: json.dumps(facts).encode()})
        with writing(f"{self.folder}: the rollouts of step {step}", "make it writable, or set ppo.keep_rollouts = 0"):
            self._replace(step, table)

    def _replace(self, step: int, table: pa.Table) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = step_path(self.folder, step)
        partial = path.with_suffix(SAVING)
        try:
            pq.write_table(table, partial, compression="zstd")
        except OSError:
            partial.unlink(missing_ok=True)  # on a full disk it would be in the way of everything else
            raise
        partial.rename(path)
        earlier = [number for number in kept_steps(self.folder) if number <= step]
        for number in set(kept_steps(self.folder)) - set(earlier[-self.config.keep_rollouts :]):
            step_path(self.folder, number).unlink()

    def _columns(self, batch: Batch, credited: Experience) -> dict[str, Any]:
        rollouts, scores, collected = batch.rollouts, batch.scores, batch.experience
        lengths = [len(rollout.ids) for rollout in rollouts]

        def per_token(x_BT: torch.Tensor | None) -> list[np.ndarray[Any, Any] | None]:
            if x_BT is None:
                return [None] * len(lengths)
            return [row[:length] for row, length in zip(x_BT.numpy(), lengths, strict=True)]

        trained_B = credited.mask_BT.any(dim=1)
        columns: dict[str, Any] = {
            "prompt_id": [rollout.prompt.id for rollout in rollouts],
            "prompt": [rollout.prompt.text for rollout in rollouts],
            "response": [self.decode(rollout.ids) for rollout in rollouts],
            "prompt_ids": pa.array([rollout.prompt.ids for rollout in rollouts], pa.list_(pa.int32())),
            "ids": pa.array([rollout.ids for rollout in rollouts], pa.list_(pa.int32())),
            "sample": [rollout.sample for rollout in rollouts],
            "finish": [str(rollout.finish) for rollout in rollouts],
            "versions": pa.array([rollout.versions for rollout in rollouts], pa.list_(pa.int32())),
            "trained": trained_B.tolist(),
            "score": scores.total_B,
            "shaped_score": collected.scores_B.numpy(),
            **{f"{PART}{name}": part_B for name, part_B in scores.parts.items()},
        }
        if scores.disagreement_B is not None:
            columns["disagreement"] = scores.disagreement_B
        for name in (*INPUTS, *RESULTS):
            x_BT = getattr(collected if name in INPUTS else credited, f"{name}_BT")
            columns[name] = pa.array(per_token(x_BT), pa.list_(pa.float32()))
        return columns


def step_path(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / f"step-{step:08d}.parquet"


def kept_steps(folder: Path) -> list[int]:
    """Steps whose rollouts are there, in order."""
    return sorted(int(match[1]) for path in folder.glob("*.parquet") if (match := STEP.fullmatch(path.name)))


def read_step(folder: Path, step: int) -> tuple[Batch, PpoConfig]:
    """A recorded step, its masked rows as they were, and the loop's configuration.

    Raises ConfigError where it is not there, CheckpointError where its file is damaged.
    """
    path = step_path(folder, step)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder: name the folder of a run that has come to PPO")
    if not path.is_file():
        there = kept_steps(folder)
        range_text = f"it has steps {there[0]} to {there[-1]}" if there else "it has none"
        raise ConfigError(f"{folder}: no rollouts of step {step} there ({range_text}; ppo.keep_rollouts says how many are kept)")
    try:
        table = pq.read_table(path)
        if not table.num_rows:
            raise ValueError("it has no rows")
        return _batch(table.to_pydict(), json.loads(table.schema.metadata[FACTS]))
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no rollouts of ours, or damaged ({type(error).__name__}: {first_line(error)}): "
            "restore the file, or read it with the version that wrote it"
        ) from error


def _batch(columns: Mapping[str, Sequence[Any]], facts: Mapping[str, Any]) -> tuple[Batch, PpoConfig]:
    rollouts = _rollouts(columns)
    batch = Batch(
        step=facts["step"],
        version=facts["version"],
        rollouts=rollouts,
        scores=_scores(columns, facts),
        experience=_experience(columns, rollouts, facts["pad_id"]),
        credit=facts["credit"],
    )
    return batch, PpoConfig.model_validate(facts["config"])


def _rollouts(columns: Mapping[str, Sequence[Any]]) -> list[Rollout]:
    names = ("prompt_id", "prompt", "prompt_ids", "sample", "ids", "behaviour", "finish", "versions")
    return [
        Rollout(
            prompt=Prompt(prompt_id, text, np.array(prompt_ids, np.int32)),
            sample=sample,
            ids=np.array(ids, np.int32),
            logprobs=np.array(behaviour, np.float32),
            finish=FinishReason(finish),
            versions=np.array(versions, np.int32),
        )
        for prompt_id, text, prompt_ids, sample, ids, behaviour, finish, versions in zip(*(columns[name] for name in names), strict=True)
    ]


def _scores(columns: Mapping[str, Sequence[Any]], facts: Mapping[str, Any]) -> Scores:
    def doubles(name: str) -> DoubleArray:
        return np.array([math.nan if value is None else value for value in columns[name]])

    return Scores(
        total_B=doubles("score"),
        parts={name.removeprefix(PART): doubles(name) for name in columns if name.startswith(PART)},
        held_out=frozenset(facts["held_out"]),
        disagreement_B=doubles("disagreement") if "disagreement" in columns else None,
    )


def _experience(columns: Mapping[str, Sequence[Any]], rollouts: Sequence[Rollout], pad_id: int) -> Experience:
    tokens = TokenBatch.from_rollouts(rollouts, pad_id)
    length = tokens.mask_BT.shape[1]

    def per_token(name: str) -> torch.Tensor:
        return pad_rows([np.array(row, np.float32) for row in columns[name]], length)

    return Experience(
        tokens=replace(tokens, mask_BT=tokens.mask_BT & torch.tensor(columns["trained"])[:, None]),
        scores_B=torch.tensor(columns["shaped_score"], dtype=torch.float32),
        behaviour_BT=per_token("behaviour"),
        proximal_BT=per_token("proximal"),
        reference_BT=per_token("reference"),
        values_BT=None if columns["values"][0] is None else per_token("values"),
        groups_B=prompt_groups(rollouts),
    )
