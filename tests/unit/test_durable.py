"""Folders that are replaced while the process may die."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.durable import replace_folder, settle_folder


class Death(Exception):
    """In place of SIGKILL: nothing after it runs."""


def make(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "weights").write_text(text)
    return folder


def test_replace_puts_the_new_one_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        replace_folder(target, make(tmp_path / "model.saving", text))
    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_death_between_the_renames_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    target, new = make(tmp_path / "model", "old"), make(tmp_path / "model.saving", "new")
    rename, calls = Path.rename, iter(range(1, 3))

    def rename_or_die(path: Path, to: Path) -> Path:
        if next(calls) == step:
            raise Death
        return rename(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename_or_die)
        with pytest.raises(Death):
            replace_folder(target, new)
    settle_folder(target)
    assert (target / "weights").read_text() == "old"
    replace_folder(target, new)
    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_replacing_again_after_a_death_keeps_the_old_one_until_the_new_one_is_there(tmp_path: Path) -> None:
    make(tmp_path / "model.replaced", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "model", tmp_path / "model.saving")
    assert (tmp_path / "model.replaced" / "weights").read_text() == "old"
