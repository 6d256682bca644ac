"""Files that are either complete or absent, whatever moment the process dies at, and the hashes that prove it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.errors import CheckpointError, CorralError, DiskError, first_line
from app.run_layout import MANIFEST, REPLACED, SAVING

TORCH_WRITER = "inline_container"
"""In the RuntimeError of `torch.save` where it could not write all."""


@contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Within this block a disk that is full, read-only or gone is a DiskError, which says what could not be written."""
    try:
        yield
    except CorralError:  # a deadline's is a TimeoutError and with it an OSError
        raise
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and TORCH_WRITER not in str(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DiskError(f"{what} cannot be written ({reason}): free space there, or {remedy}") from error


def without_non_finite(value: Any) -> Any:
    """`value` with every NaN and infinity, at any depth, replaced by None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step: temporary name, fsync, rename, fsync of the folder. NaN and infinity raise ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}{SAVING}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. CheckpointError where it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON ({error}): restore it, or start in another --run.dir") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object: restore it, or start in another --run.dir")
    return value


def sync(path: Path) -> None:
    """Force one file or folder entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force every file and folder under `folder` to disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def replace_folder(target: Path, new: Path) -> None:
    """Put the folder `new` in the place of `target`. A death at any moment leaves one of the two complete; `settle_folder` finds it."""
    settle_folder(target)
    old = _replaced(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle_folder(target: Path) -> None:
    """Undo a `replace_folder` that died between its two renames: the old folder gets its name back."""
    old = _replaced(target)
    if old.is_dir() and not target.exists():
        old.rename(target)


def _replaced(target: Path) -> Path:
    return target.with_name(f"{target.name}{REPLACED}")


def file_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> {"size": bytes, "sha256": hex} of every file under `folder`, its own manifest excepted."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != MANIFEST]
    return {name: {"size": (folder / name).stat().st_size, "sha256": digest} for name, digest in _hashes(folder, names).items()}


def _hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    def sha256(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
        return dict(zip(names, pool.map(sha256, names), strict=True))


def damage(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with the recorded `files` under `folder`: the first missing or changed one, or None. Sizes go first: they are cheap."""
    if (misfit := wrong_size(folder, files)) is not None:
        return misfit
    for name, digest in _hashes(folder, list(files)).items():
        if digest != files[name]["sha256"]:
            return f"{name} has other content than when it was written"
    return None


def wrong_size(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """As `damage`, without looking at contents."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != record["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {record['size']}"
    return None


def hash_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One SHA-256 over names and contents as `file_hashes` lists them."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{files[name]['sha256']}\n".encode())
    return digest.hexdigest()


def tree_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of all files under `folder` (a model folder's identity); times and modes do not count."""
    return hash_of(file_hashes(folder))
