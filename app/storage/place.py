"""Folders behind a URL: local and shared file systems, S3, Google Cloud Storage, and whatever else fsspec knows."""

from __future__ import annotations

import contextlib
import functools
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec
import pyarrow
from pyarrow import fs as arrow

from app.errors import CheckpointError, ConfigError, first_line
from app.run_layout import SAVING

NATIVE = ("s3", "gs", "gcs", "hdfs")
"""Schemes that pyarrow brings along; the rest goes through fsspec and its packages."""
BUFFER_BYTES = 8 * 2**20

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def _raising_os_errors(method: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """The method with every error as an OSError: clients of object stores have errors of their own."""

    @functools.wraps(method)
    def asked(*arguments: Given.args, **options: Given.kwargs) -> Answer:
        try:
            return method(*arguments, **options)
        except OSError:
            raise
        except Exception as error:
            raise OSError(first_line(error)) from error

    return asked


@dataclass(frozen=True)
class Place:
    """A folder: `root` in a pyarrow file system. Names are relative to it, with slashes. Methods raise OSError."""

    url: str
    system: Any
    root: str

    @property
    def is_local(self) -> bool:
        """Whether `root` is a path of this machine, or of a file system that it shares."""
        return isinstance(self.system, arrow.LocalFileSystem)

    def inside(self, name: str) -> Place:
        """A folder in this one."""
        return Place(f"{self.url.rstrip('/')}/{name}", self.system, self._path(name))

    @_raising_os_errors
    def files(self) -> dict[str, int]:
        """Bytes of every file at any depth, by name; nothing where there is no such folder."""
        if (client := self._client()) is not None:
            levels = client.walk(self.root, detail=True, on_error=_unless_absent)
            return {self._name(info["name"]): int(info["size"]) for _, _, files in levels for info in files.values()}
        found = self.system.get_file_info(arrow.FileSelector(self.root, allow_not_found=True, recursive=True))
        return {self._name(info.path): int(info.size) for info in found if info.type == arrow.FileType.File}

    @_raising_os_errors
    def folders(self) -> list[str]:
        """Names of the folders right under this one."""
        if (client := self._client()) is not None:
            levels = client.walk(self.root, maxdepth=1, detail=True, on_error=_unless_absent)
            return sorted(self._name(info["name"].rstrip("/")) for _, folders, _ in levels for info in folders.values())
        found = self.system.get_file_info(arrow.FileSelector(self.root, allow_not_found=True))
        return sorted(self._name(info.path) for info in found if info.type == arrow.FileType.Directory)

    @_raising_os_errors
    def read(self, name: str, start: int = 0) -> bytes | None:
        """The content of a file, from a byte on (negative: so many from the end); None where there is none."""
        try:
            with self._opened(name) as file:
                size = int(file.seek(0, 2))
                file.seek(min(size, start) if start >= 0 else max(0, size + start))
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def parsed(self, name: str, content: bytes, remedy: str) -> Any:
        """The JSON value that `read` gave as the content of a file. Raises CheckpointError, which ends in `remedy`."""
        try:
            return json.loads(content)
        except ValueError as error:
            raise CheckpointError(f"{self.url}/{name} is no valid JSON ({error}): {remedy}") from error

    @_raising_os_errors
    def write(self, name: str, content: bytes) -> None:
        """Replace a file in one step."""
        with self._replacing(name) as path, self.system.open_output_stream(path) as stream:
            stream.write(content)

    @_raising_os_errors
    def put(self, source: Path, name: str) -> None:
        """Copy a local file here, in one step where the file system can do it (object stores, local and shared ones)."""
        with source.open("rb") as file, self._replacing(name) as path, self.system.open_output_stream(path) as stream:
            while block := file.read(BUFFER_BYTES):
                stream.write(block)

    @_raising_os_errors
    def get(self, name: str, target: Path) -> None:
        """Copy a file from here to a local path, in one step."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}{SAVING}")
        with self._opened(name) as stream, partial.open("wb") as file:
            while block := stream.read(BUFFER_BYTES):
                file.write(block)
        partial.rename(target)

    @_raising_os_errors
    def delete(self, name: str) -> None:
        """Delete a file; one that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            client = self._client()
            (self.system.delete_file if client is None else client.rm_file)(self._path(name))

    @_raising_os_errors
    def delete_folder(self, name: str) -> None:
        """Delete a folder with all that is in it; one that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.system.delete_dir(self._path(name))

    def _client(self) -> Any | None:
        """fsspec's file system, which has forgotten what it saw; None where pyarrow has its own.

        It is asked itself where pyarrow would ask it whether something is there: it says no to that also when it gets no answer.
        """
        if not isinstance(self.system, arrow.PyFileSystem):
            return None
        client = self.system.handler.fs
        client.invalidate_cache()
        return client

    def _opened(self, name: str) -> Any:
        client = self._client()
        return self.system.open_input_file(self._path(name)) if client is None else client.open(self._path(name), "rb")

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Any:
        """The path to write to. An object appears when it is complete; a file is written beside its place and renamed."""
        path = self._path(name)
        if not self.is_local:
            if isinstance(self.system, arrow.PyFileSystem):
                self.system.create_dir(path.rpartition("/")[0], recursive=True)
            yield path
            return
        parent, _, last = path.rpartition("/")
        self.system.create_dir(parent, recursive=True)
        partial = f"{parent}/.{last}{SAVING}"
        yield partial
        self.system.move(partial, path)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _name(self, path: str) -> str:
        return path.lstrip("/").removeprefix(self.root.strip("/")).lstrip("/")


def _unless_absent(error: Exception) -> None:
    """What is not there, or vanishes while it is listed, has no files; any other error is one."""
    if not isinstance(error, FileNotFoundError):
        raise error


def open_place(url: str, key: str = "run.storage") -> Place:
    """The folder that a URL, or a local path, names. Nothing is read yet. Raises ConfigError, which names `key`."""
    scheme, separator, rest = url.partition("://")
    try:
        if not separator:
            return Place(url, arrow.LocalFileSystem(), str(Path(url).expanduser().absolute()))
        if not rest.strip("/"):
            raise ValueError("it names no folder")
        if scheme == "file":
            return Place(url, arrow.LocalFileSystem(), str(Path(f"/{rest.lstrip('/')}")))
        if scheme in NATIVE:
            system, root = arrow.FileSystem.from_uri(url)
        else:
            found, root = fsspec.core.url_to_fs(url)
            system = arrow.PyFileSystem(arrow.FSSpecHandler(found))
        return Place(url, system, str(root).rstrip("/"))
    except (OSError, ValueError, ImportError, pyarrow.ArrowException) as error:
        raise ConfigError(
            f"{key} = {url}: cannot be opened ({first_line(error)}); give s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER"
        ) from error


def require_writable(place: Place, key: str = "run.storage") -> None:
    """Write, read and delete a small file. Raises ConfigError where that does not work, with the reason."""
    name, content = f".probe-{uuid.uuid4().hex}", b"corral"
    if place.is_local and not Path(place.root).parent.is_dir():
        raise ConfigError(f"{key} = {place.url}: {Path(place.root).parent} does not exist; mount it, or make it")
    try:
        place.write(name, content)
        back = place.read(name)
        place.delete(name)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(
            f"{key} = {place.url}: cannot be written ({first_line(error)}); check the address, the credentials and what they may do there"
        ) from error
    if back != content:
        raise ConfigError(f"{key} = {place.url}: does not give back what was written there; choose another place")
