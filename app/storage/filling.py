"""The local folder of a run brought to what its URL holds, and the record of what the URL has of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from app.durable import damage, read_json, write_json
from app.errors import CheckpointError
from app.run_folder import is_blank, refuse_other_config
from app.run_layout import LOGS, MANIFEST
from app.storage.mirrored_files import CHECKPOINT_FOLDERS, Stamp, needed, rank, stamp_of, tracked, unfinished_checkpoints
from app.storage.place import Place

INDEX = ".storage.json"
"""In the local folder: what the URL has of it, so that a restart in the same folder sends only what has changed."""
THREADS = 4

Sent = dict[str, Stamp]
"""What a URL has, by name, with the stamp of the local file."""


def fill(path: Path, place: Place, identity: Mapping[str, Any], tell: Callable[[str], object]) -> Sent:
    """Bring a run's folder to what the URL holds, unless it is as far or further; returns what the URL has of it. Only what is needed to
    go on is fetched. Raises CheckpointError where the URL holds a run of another configuration, or another run than the folder."""
    there = _manifest_there(place)
    if there is None or is_blank(there):
        return {}
    refuse_other_config(place.url, there, identity)
    here = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else None
    relation = "behind" if here is None or is_blank(here) else lineage(here["sessions"], there["sessions"])
    if relation == "other":
        raise CheckpointError(
            f"run folder {path} and {place.url} hold two different runs: choose another --run.dir or another --run.storage"
        )
    if relation == "ahead":
        return read_index(path, place)
    if here is None or is_blank(here):
        _require_own(path, place)
    tell(f"storage: fetching the run from {place.url}")
    return _fetch(path, place)


def read_index(path: Path, place: Place) -> Sent:
    """What an earlier session has sent from this folder to this URL; without the file, or for another URL, everything goes again."""
    index = _index(path)
    return {name: (size, changed) for name, (size, changed) in index["files"].items()} if index["url"] == place.url else {}


def write_index(path: Path, place: Place, sent: Mapping[str, Stamp]) -> None:
    """Note what the URL has. Raises OSError."""
    write_json(path / INDEX, {"url": place.url, "files": sent})


def _index(path: Path) -> dict[str, Any]:
    return read_json(path / INDEX) if (path / INDEX).is_file() else {"url": None, "files": {}}


def _manifest_there(place: Place) -> dict[str, Any] | None:
    content = place.read(MANIFEST)
    if content is None:
        return None
    manifest = place.parsed(MANIFEST, content, "choose another run.storage")
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{place.url}/{MANIFEST} is no manifest of a run: choose another run.storage")
    return manifest


def _require_own(path: Path, place: Place) -> None:
    """CheckpointError where the folder, which holds no run yet, holds files of someone else: a fetch would delete them."""
    if _index(path)["url"] == place.url:
        return  # what a fetch left that was cut short, or a run that ended before it had read its data
    others = (name for name, _ in tracked(path) if name != MANIFEST and PurePosixPath(name).parts[0] != LOGS)
    if (other := next(others, None)) is not None:
        raise CheckpointError(
            f"run folder {path} holds no run but other files, such as {other}, and a run would be fetched into it from "
            f"{place.url}: choose another --run.dir"
        )


def _fetch(path: Path, place: Place) -> Sent:
    """Make the folder what the URL holds."""
    there = place.files()
    write_index(path, place, {})  # if it is cut short, the next one knows what it finds
    for folder in [folder for pattern in CHECKPOINT_FOLDERS for folder in path.glob(pattern)]:
        shutil.rmtree(folder)
    for name, _ in list(tracked(path)):
        (path / name).unlink()
    sent = _get(path, place, needed(there))
    for checkpoints in unfinished_checkpoints(there):
        for checkpoint in checkpoints:
            sent |= _get(path, place, [name for name in there if name.startswith(f"{checkpoint}/")])
            if is_whole(path / checkpoint):
                break
    sent |= _get(path, place, [MANIFEST])  # last of all: a folder without it is filled again
    write_index(path, place, sent)
    return sent


def _get(path: Path, place: Place, names: Sequence[str]) -> Sent:
    """Fetch files, those that describe others last."""

    def get(name: str) -> None:
        place.get(name, path / name)

    for manifests in (False, True):
        some = [name for name in names if (rank(name) > 0) == manifests]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(get, some))
    return {name: stamp_of(path / name) for name in names}


def lineage(here: Sequence[Mapping[str, Any]], there: Sequence[Mapping[str, Any]]) -> str:
    """How a folder stands to a URL, by the sessions that both have seen: `ahead` (or level), `behind`, or `other`, another run.

    >>> lineage([{"started": 1.0}, {"started": 2.0}], [{"started": 1.0}]), lineage([{"started": 1.0}], [{"started": 2.0}])
    ('ahead', 'other')
    """
    mine, theirs = ([session["started"] for session in sessions] for sessions in (here, there))
    if mine[: len(theirs)] == theirs:
        return "ahead"
    return "behind" if mine[:1] == theirs[:1] else "other"


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint arrived as its manifest says."""
    try:
        return damage(checkpoint, read_json(checkpoint / MANIFEST)["files"]) is None
    except (CheckpointError, KeyError):
        return False
