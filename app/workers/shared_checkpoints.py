"""Checkpoints that all ranks of a training write together and one of them commits, beside the steps that follow.

They are a `CheckpointStore`'s, as in PPO, and not Ray Train's: its list of reported checkpoints is one file rewritten in place, which
refuses every later start once it was cut short, and it has no checksums.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from app.checkpoint import CheckpointStore, OverlappedCheckpoints
from app.errors import CheckpointError
from app.workers.deepspeed_engine import save_engine

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class SharedCheckpoints:
    """One rank's view. `newest` and `save` are collectives. At the end of the `with` block nothing is under way."""

    def __init__(self, folder: Path, keep: int, device: torch.device, *, deadline_seconds: float) -> None:
        self.store, self.device = CheckpointStore(folder, keep), device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._commits = OverlappedCheckpoints(self.store, deadline_seconds=deadline_seconds)  # of rank 0; others have none

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._commits.__exit__(kind, error, trace)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, chosen by rank 0; None where there is none at all.

        Raises CheckpointError, on every rank, where those that are there are damaged or of another number of workers.
        """
        found: Path | CheckpointError | None = None
        if self.rank == 0:
            try:
                found = self._newest()
            except CheckpointError as error:
                found = error
        found = self._from_rank_zero(found)
        if isinstance(found, CheckpointError):
            raise found
        return found

    def save(self, step: int, engine: DeepSpeedEngine, state: Mapping[str, Any]) -> None:
        """As `OverlappedCheckpoints.save`: rank 0 opens the checkpoint and commits it, once every rank has written its own shards, beside
        what follows. `state` is rank 0's, anything that pickles. Raises, on rank 0, also what the commit before has raised."""

        def write(folder: Path | None) -> None:
            save_engine(engine, self._from_rank_zero(folder), state)
            dist.barrier()  # all shards are there

        if self.rank == 0:
            self._commits.save(step, {"workers": self.world_size}, write)
        else:
            write(None)

    def settle(self, *, wait_for_it: bool) -> None:
        """Raise, on rank 0, what the commit under way has raised, after waiting for its end if wanted."""
        self._commits.settle(wait_for_it=wait_for_it)

    def _newest(self) -> Path | None:
        saved = self.store.latest()
        if saved is None:
            return None
        workers = saved.state["workers"]
        if workers != self.world_size:
            raise CheckpointError(
                f"{saved.path} was saved by {workers} workers, and there are {self.world_size}: "
                f"set workers.count = {workers}, or delete {self.store.folder} to start over"
            )
        return saved.path

    def _from_rank_zero(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]
