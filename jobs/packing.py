"""What a job takes along: the files of the working directory, without run folders and data, at most what the job server takes."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray._private.runtime_env import packaging

from app.errors import ConfigError
from app.run_layout import LOCK, MANIFEST

LIMIT_BYTES = 100 * 2**20
"""The job server refuses larger packages; it gets them uncompressed."""
ZIP_ENTRY_BYTES = 30 + 46
"""A file's two headers in an archive, its name in each left out."""
SHOWN = 5
MODULES = ("app", "serve", "jobs")
# anchored: a bare `data` would leave out app/data as well
EXCLUDES = (
    "/.git",
    "/.venv",
    "/runs",
    "/data",
    "/docs",
    "**/__pycache__",
    "/.mypy_cache",
    "/.ruff_cache",
    "/.pytest_cache",
    "/.hypothesis",
)


@dataclass(frozen=True)
class Package:
    """root: the working directory; sizes: bytes of every file in it that goes along, by path relative to it; excludes: Ray's patterns."""

    root: Path
    sizes: dict[str, int]
    excludes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of the uncompressed archive that Ray makes."""
        return sum(size + 2 * len(name.encode()) + ZIP_ENTRY_BYTES for name, size in self.sizes.items())

    def holds(self, path: str | Path) -> bool:
        """Whether a file, or anything of a folder, goes along. Relative paths are meant from the root."""
        absolute = (self.root / path).resolve()
        if not absolute.is_relative_to(self.root):
            return False
        name = absolute.relative_to(self.root).as_posix()
        return name in self.sizes or any(file.startswith(f"{name}/") for file in self.sizes)


def pack(root: Path) -> Package:
    """What of `root` goes along; `.gitignore` and `.rayignore` count. Raises ConfigError, naming the largest files, above LIMIT_BYTES."""
    root = root.resolve()
    folders = run_folders(root, EXCLUDES)
    excludes = (*EXCLUDES, *(f"/{folder}" for folder in folders))
    files = {path.relative_to(root).as_posix(): path.stat().st_size for path in _files(root, excludes)}
    package = Package(root, files, excludes)
    if package.bytes > LIMIT_BYTES:
        raise ConfigError(too_large(package))
    return package


def run_folders(root: Path, excludes: Sequence[str]) -> list[str]:
    """Run folders below `root`, wherever they are, by path relative to it."""
    manifests = [path for path in _files(root, excludes) if path.name == MANIFEST]
    return sorted(path.parent.relative_to(root).as_posix() for path in manifests if (path.parent / LOCK).is_file() and path.parent != root)


def _files(root: Path, excludes: Sequence[str]) -> list[Path]:
    """As Ray will find them, so that what is counted is what is sent."""
    ignores = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"  # as Ray's client reads it
    found: list[Path] = []
    quiet = logging.getLogger(f"{__name__}.ray")
    quiet.setLevel(logging.ERROR)
    packaging._dir_travel(
        root,
        [packaging._get_excludes(root, list(excludes))],
        lambda path: found.append(path) if path.is_file() else None,
        include_gitignore=ignores,
        logger=quiet,
    )
    return found


def too_large(package: Package) -> str:
    """The refusal of a package above the limit, in one line."""
    largest = sorted(package.sizes.items(), key=lambda item: -item[1])[:SHOWN]
    listed = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in largest)
    return (
        f"{package.root} would be sent with {package.bytes / 2**20:.0f} MiB, and the job server takes {LIMIT_BYTES / 2**20:.0f} MiB: "
        f"list what the job does not need in .rayignore, or move it out; the largest files: {listed}"
    )


def missing_modules(package: Package) -> list[str]:
    """Folders of our own packages that the working directory does not bring, for Ray's `py_modules`."""
    if package.holds("jobs/main.py"):
        return []
    return [str(Path(str(importlib.import_module(name).__file__)).parent) for name in MODULES]


def packages_of(lock: Path, torch: str) -> dict[str, object]:
    """Ray's `uv` runtime environment that puts the packages of a lock over those of the nodes. Raises ConfigError.

    torch: its version, which the locks leave out. Ray itself must be there already, and a complete lock needs no resolution.
    """
    try:
        lines = [line.strip() for line in lock.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--install={lock}: cannot be read ({error}); give a lock such as requirements/cuda.txt") from error
    pinned = [line for line in lines if line and not line.startswith("#") and not line.startswith("ray==")]
    loose = [line for line in pinned if "==" not in line]
    if loose or not pinned:
        problem = f"{loose[0]} is no pinned package" if loose else "it is empty"
        raise ConfigError(f"--install={lock}: {problem}; give a lock such as requirements/cuda.txt")
    return {"packages": [f"torch=={torch}", *pinned], "uv_check": False, "uv_pip_install_options": ["--no-deps"]}
