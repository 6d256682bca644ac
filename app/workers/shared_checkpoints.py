"""Checkpoints that all ranks of a training write together and one of them commits.

They are a `CheckpointStore`'s, as in PPO, and not Ray Train's: its list of reported checkpoints is one file rewritten in place, which
refuses every later start once it was cut short, and it has no checksums.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from app.checkpoint import CheckpointStore
from app.errors import CheckpointError
from app.workers.deepspeed_engine import save_engine

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class SharedCheckpoints:
    """One rank's view. Every method is a collective."""

    def __init__(self, folder: Path, keep: int, device: torch.device) -> None:
        self.store, self.device = CheckpointStore(folder, keep), device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

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
        """Commit a checkpoint: rank 0 opens and closes it, every rank writes its own shards. `state` is rank 0's, anything that pickles."""

        def write(folder: Path | None) -> None:
            save_engine(engine, self._from_rank_zero(folder), state)
            dist.barrier()  # all shards are there

        if self.rank == 0:
            self.store.save(step, {"workers": self.world_size}, write)
        else:
            write(None)

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
