"""Which files of a run folder are kept at `run.storage`, in which order they are sent, and which of them another machine needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from app.checkpoint import PREFIX
from app.durable import MANIFEST

CHECKPOINTS, BEST = "checkpoints", ".model.best"
RECOMPUTED = "data"
"""Folders of this name, of the run and of its stages, hold what is read again from the source of the data."""
SENT_ONLY = "logs"
BEST_LAST = "held_out.json"
"""Of the best model so far, which has no manifest, the file that is sent last."""

Stamp = tuple[int, int]
"""Bytes, and time of the last change in ns."""


def rank(name: str) -> int:
    """When a file is sent: 0 at first, 1 after what it completes, 2 for manifests, the run's own last of all.

    >>> [rank(name) for name in ("sft/model/config.json", "sft/.model.best/held_out.json", "sft/manifest.json", "manifest.json")]
    [0, 1, 2, 3]
    """
    path = PurePosixPath(name)
    if path.name == MANIFEST and (len(path.parts) < 3 or is_checkpoint(path.parent)):
        return 3 if len(path.parts) == 1 else 2
    return int(path.name == BEST_LAST and path.parent.name == BEST)


def is_tracked(name: str) -> bool:
    """Whether a file belongs to what is kept at the URL: no hidden or half-written file, no cache of the data.

    >>> [is_tracked(name) for name in ("metrics.jsonl", ".lock", "sft/data/train.parquet", "sft/checkpoints/step-00000002/a")]
    [True, False, False, True]
    >>> [is_tracked(name) for name in ("sft/.model.best/config.json", "sft/model.saving/config.json", "sft/checkpoints/.saving-step-1/a")]
    [True, False, False]
    """
    parts = PurePosixPath(name).parts
    if RECOMPUTED in parts[:-1][:2]:
        return False
    if any((part.startswith(".") and part != BEST) or part.endswith((".saving", ".replaced")) for part in parts):
        return False
    return len(parts) < 3 or parts[1] != CHECKPOINTS or parts[2].startswith(PREFIX)


def tracked(path: Path) -> Iterator[tuple[str, Stamp]]:
    """The files of a run folder that are kept at the URL. What vanishes meanwhile is left out."""
    for folder, folders, files in os.walk(path):
        inside = Path(folder).relative_to(path)
        folders[:] = [name for name in folders if is_tracked((inside / name / PREFIX).as_posix())]  # may hold such a file
        for file in files:
            name = (inside / file).as_posix()
            stamp = stamp_or_none(path / name) if is_tracked(name) else None
            if stamp is not None:
                yield name, stamp


def needed(there: Mapping[str, int]) -> list[str]:
    """What a run that goes on elsewhere needs at once: not its manifest, which comes last, nor logs, checkpoints and hidden files."""
    later = (SENT_ONLY, CHECKPOINTS)
    return [name for name in there if is_tracked(name) and name != MANIFEST and not set(later) & set(PurePosixPath(name).parts[:-1][:2])]


def unfinished_checkpoints(there: Mapping[str, int]) -> list[list[str]]:
    """For each stage without a manifest, its complete checkpoints as folders, newest first."""
    stages: dict[str, list[str]] = {}
    for name in there:
        path = PurePosixPath(name)
        if path.name == MANIFEST and is_checkpoint(path.parent):
            stages.setdefault(path.parts[0], []).append(str(path.parent))
    return [sorted(folders, reverse=True) for stage, folders in sorted(stages.items()) if f"{stage}/{MANIFEST}" not in there]


def is_checkpoint(folder: PurePosixPath) -> bool:
    """Whether a folder is `STAGE/checkpoints/step-...`."""
    parts = folder.parts
    return len(parts) == 3 and parts[1] == CHECKPOINTS and parts[2].startswith(PREFIX)


def stamp_of(path: Path) -> Stamp:
    """Size and time of a file's last change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def stamp_or_none(path: Path) -> Stamp | None:
    try:
        return stamp_of(path)
    except FileNotFoundError:
        return None
