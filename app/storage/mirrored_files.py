"""Which files of a run folder are kept at `run.storage`, in which order they are sent, and which of them another machine needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from app.checkpoint import PREFIX
from app.run_layout import BEST_MODEL, CHECKPOINTS, DATA, HELD_OUT_METRICS, LOGS, MANIFEST, REPLACED, SAVING, SEARCH

CHECKPOINT_FOLDERS = (f"*/{CHECKPOINTS}/{PREFIX}*", f"{SEARCH}/*/{CHECKPOINTS}/{PREFIX}*")
"""Patterns of stages' and of trials' checkpoints in a run folder."""
SEARCH_LAST = "experiment_state-"
"""Of what a search goes on from, how the file begins that says which trials there are."""

Stamp = tuple[int, int]
"""Bytes, and time of the last change in ns."""


def rank(name: str) -> int:
    """When a file is sent: 0 at first, 1 after what it completes, 2 for manifests, 3 for what a search goes on from, the run's own
    manifest last of all.

    >>> [rank(name) for name in ("sft/model/config.json", "sft/.model.best/held_out.json", "sft/manifest.json", "manifest.json")]
    [0, 1, 2, 4]
    >>> [rank(f"tune/{name}") for name in ("trial_a/checkpoints/step-1/manifest.json", "ended.jsonl", "trial_a/result.json")]
    [2, 3, 0]
    """
    path = PurePosixPath(name)
    if path.name == MANIFEST and (len(path.parts) < 3 or is_checkpoint(path.parent)):
        return 4 if len(path.parts) == 1 else 2
    if is_search_record(name):
        return 3
    return int(path.name == HELD_OUT_METRICS and path.parent.name == BEST_MODEL)


def order(name: str) -> tuple[int, int, bool, str]:
    """Sorts files as they are sent one after the other.

    >>> sorted(["manifest.json", "tune/experiment_state-1.json", "tune/searcher-state-1.pkl", "tune/ended.jsonl"], key=order)
    ['tune/ended.jsonl', 'tune/searcher-state-1.pkl', 'tune/experiment_state-1.json', 'manifest.json']
    """
    path = PurePosixPath(name)
    return rank(name), -len(path.parts), path.name.startswith(SEARCH_LAST), name


def is_search_record(name: str) -> bool:
    """Whether a file stands right in the folder of a search: its records, and what Tune goes on from. They name trials, models and
    checkpoints, and so are sent as they were before all of those were listed."""
    parts = PurePosixPath(name).parts
    return len(parts) == 2 and parts[0] == SEARCH and parts[1] != MANIFEST


def is_tracked(name: str) -> bool:
    """Whether a file belongs to what is kept at the URL: no hidden or half-written file, no cache of the data.

    >>> [is_tracked(name) for name in ("metrics.jsonl", ".lock", "sft/data/train.arrow", "sft/checkpoints/step-00000002/a")]
    [True, False, False, True]
    >>> [is_tracked(name) for name in ("sft/.model.best/config.json", "sft/model.saving/config.json", "sft/checkpoints/.saving-step-1/a")]
    [True, False, False]
    >>> [is_tracked(f"tune/trial_a/{name}") for name in ("checkpoints/step-00000002/a", "checkpoints/tmp/a", "checkpoint_000001/a")]
    [True, False, True]
    """
    parts = PurePosixPath(name).parts
    if DATA in parts[:-1][:2]:
        return False
    if any((part.startswith(".") and part != BEST_MODEL) or part.endswith((SAVING, REPLACED)) for part in parts):
        return False
    inside = parts[_depth(parts) :]
    return len(inside) < 2 or inside[0] != CHECKPOINTS or inside[1].startswith(PREFIX)


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

    def later(folders: Sequence[str]) -> bool:
        return bool({LOGS, CHECKPOINTS} & set(folders[: _depth(folders) + 1]))

    return [name for name in there if is_tracked(name) and name != MANIFEST and not later(PurePosixPath(name).parts[:-1])]


def unfinished_checkpoints(there: Mapping[str, int]) -> list[list[str]]:
    """The complete checkpoints, as folders, of stages without a manifest, in lists of which the first whole one is needed: those of a
    stage, newest first; of a search each alone, as a population may be about to copy any."""
    found: dict[str, list[str]] = {}
    for name in there:
        path = PurePosixPath(name)
        stage = path.parts[0]
        if path.name == MANIFEST and is_checkpoint(path.parent) and f"{stage}/{MANIFEST}" not in there:
            found.setdefault(str(path.parent) if stage == SEARCH else stage, []).append(str(path.parent))
    return [sorted(folders, reverse=True) for _, folders in sorted(found.items())]


def is_checkpoint(folder: PurePosixPath) -> bool:
    """Whether a folder is `STAGE/checkpoints/step-...`, or `tune/TRIAL/checkpoints/step-...`."""
    inside = folder.parts[_depth(folder.parts) :]
    return len(inside) == 2 and inside[0] == CHECKPOINTS and inside[1].startswith(PREFIX)


def checkpoint_of(name: str) -> PurePosixPath | None:
    """The folder of the checkpoint that a file belongs to, or None.

    >>> checkpoint_of("tune/trial_a/checkpoints/step-00000002/policy/weights"), checkpoint_of("tune/trial_a/model/config.json")
    (PurePosixPath('tune/trial_a/checkpoints/step-00000002'), None)
    """
    return next((folder for folder in PurePosixPath(name).parents if is_checkpoint(folder)), None)


def _depth(parts: Sequence[str]) -> int:
    """How many of the folders of a path lead to the stage, or to the trial of a search."""
    return 2 if parts and parts[0] == SEARCH else 1


def stamp_of(path: Path) -> Stamp:
    """Size and time of a file's last change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def stamp_or_none(path: Path) -> Stamp | None:
    try:
        return stamp_of(path)
    except FileNotFoundError:
        return None
