"""Folders behind a URL: every kind of file system gives back what it was given, and one that cannot be used is refused at once."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

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
