"""Folders behind a URL: every kind of file system gives back what it was given, and one that cannot be used is refused at once."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from app.errors import ConfigError
from app.storage.place import Place, open_place, require_writable


@pytest.fixture(params=["file", "memory", "path"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder of its own in a local file system, by URL and by path, and in an object store of fsspec's."""
    return open_place({"file": f"file://{tmp_path}/a", "memory": f"memory://{uuid.uuid4().hex}/a", "path": f"{tmp_path}/a"}[request.param])


def test_what_is_written_comes_back(place: Place, tmp_path: Path) -> None:
    assert place.files() == {}
    assert place.read("x/y.json") is None
    require_writable(place)
    place.write("x/y.json", b"one")
    place.write("x/y.json", b"two!")
    (tmp_path / "source").write_bytes(b"weights")
    place.put(tmp_path / "source", "x/z/model.bin")
    assert place.files() == {"x/y.json": 4, "x/z/model.bin": 7}
    assert place.folders() == ["x"]
    assert place.inside("x").files() == {"y.json": 4, "z/model.bin": 7}
    assert place.inside("x").folders() == ["z"]
    assert place.read("x/y.json") == b"two!"
    assert (place.read("x/y.json", 3), place.read("x/y.json", -2), place.read("x/y.json", 9), place.read("x/y.json", -9)) == (
        b"!",
        b"o!",
        b"",
        b"two!",
    )
    place.get("x/z/model.bin", tmp_path / "back" / "model.bin")
    assert (tmp_path / "back" / "model.bin").read_bytes() == b"weights"
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["model.bin"]
    place.delete("x/y.json")
    place.delete("x/y.json")
    assert place.files() == {"x/z/model.bin": 7}
    place.delete_folder("x")
    place.delete_folder("x")
    assert place.files() == {}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "names no folder"),
        ("file:///", "names no folder"),
        ("nothing://bucket/run", "nothing"),
        ("file:///nowhere/at/all/run", "/nowhere/at/all does not exist"),
        ("file:///proc/run", "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_used(url: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_writable(open_place(url))
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"run.storage = {url}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_copied_whole_leaves_the_old_one(tmp_path: Path) -> None:
    place = open_place(f"file://{tmp_path}/a")
    place.write("x", b"old")
    with pytest.raises(OSError, match="absent"):
        place.put(tmp_path / "absent", "x")
    assert place.files() == {"x": 3}


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = open_place(f"file://{tmp_path}/a")

    def denied(self: Place, name: str, content: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Place, "write", denied)
    with pytest.raises(ConfigError, match=r"cannot be written .*Permission denied.*credentials"):
        require_writable(place)


class Unavailable(MemoryFileSystem):
    """A store whose client has errors of its own, as those of Azure and of Google have."""

    protocol = "unavailable"
    error: type[Exception]

    def info(self, path: str, **options: Any) -> Any:
        raise Unavailable.error("503 Service Unavailable\nRetry-After: 5")

    ls = find = _open = rm_file = rm = makedirs = info


@pytest.mark.parametrize("error", [RuntimeError, OSError])
@pytest.mark.parametrize(
    "ask",
    [
        lambda place, file: place.files(),
        lambda place, file: place.folders(),
        lambda place, file: place.read("x"),
        lambda place, file: place.write("x", b""),
        lambda place, file: place.put(file, "x"),
        lambda place, file: place.get("x", file.with_name("back")),
        lambda place, file: place.delete("x"),
        lambda place, file: place.delete_folder("x"),
    ],
    ids=["files", "folders", "read", "write", "put", "get", "delete", "delete_folder"],
)
def test_an_outage_is_an_error_of_the_operating_system_and_no_empty_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Place, Path], object], error: type[Exception]
) -> None:
    """A thread that sends would end with any other error; and where nothing seems to be there, a run begins anew."""
    fsspec.register_implementation("unavailable", Unavailable, clobber=True)
    monkeypatch.setattr(Unavailable, "error", error, raising=False)
    file = tmp_path / "file"
    file.write_bytes(b"weights")
    place = open_place("unavailable://bucket/run")
    with pytest.raises(OSError, match="503 Service Unavailable"):
        ask(place, file)
    with pytest.raises(ConfigError, match=r"cannot be written \(503 Service Unavailable\)"):
        require_writable(place)


class Remembering(MemoryFileSystem):
    """A store whose client remembers what it has seen until it is told to forget it."""

    protocol = "remembering"
    seen: ClassVar[dict[Any, Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("remembering://", "memory://")))

    def info(self, path: str, **options: Any) -> Any:
        if path not in self.seen:
            self.seen[path] = super().info(path, **options)
        return self.seen[path]

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        if (path, detail) not in self.seen:
            self.seen[path, detail] = super().ls(path, detail=detail, **options)
        return self.seen[path, detail]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.seen.clear()


def test_what_another_machine_has_written_is_seen() -> None:
    """A lease that seems never to be renewed would be taken over."""
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    place, folder = open_place("remembering://bucket/run"), uuid.uuid4().hex
    place = place.inside(folder)
    there = open_place(f"memory://bucket/run/{folder}")
    there.write("lease", b"one")
    assert (place.files(), place.folders(), place.read("lease")) == ({"lease": 3}, [], b"one")
    there.write("lease", b"two and more")
    there.write("a/b", b"")
    assert (place.files(), place.folders(), place.read("lease")) == ({"lease": 12, "a/b": 0}, ["a"], b"two and more")
