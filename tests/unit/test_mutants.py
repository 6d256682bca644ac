"""The list of mutants: it cannot rot, and the runner tells a survivor from one that is noticed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench import mutation
from bench.mutation import ROOT, occurrences, verdict
from tests.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.kind}: {mutant.breaks}")
def test_what_a_mutant_replaces_stands_once_in_its_file(mutant: Mutant) -> None:
    assert occurrences(mutant) == 1
    assert mutant.new != mutant.old and mutant.breaks
    assert all((ROOT / test).exists() for test in mutant.tests) and mutant.tests


def test_every_kind_of_mistake_is_there_three_times() -> None:
    kinds = Counter(mutant.kind for mutant in MUTANTS)
    asked = {"mask", "shift", "sign", "denominator", "gae", "clip", "kl", "version"}
    assert set(kinds) == asked | {"critic", "pretraining", "adapter", "packing", "carried", "healing"}
    assert min(kinds.values()) >= 3 and len(MUTANTS) >= 25


@pytest.mark.parametrize(("code", "expected"), [(0, "survives"), (1, None), (-14, None), (2, "could not be run"), (4, "could not be run")])
def test_verdicts(code: int, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a test that fails, or does not end, notices a mutant; the file is as it was afterwards."""
    mutant = MUTANTS[0]
    planted: list[str] = []

    def copy(folder: Path) -> None:
        (folder / mutant.file).parent.mkdir(parents=True)
        (folder / mutant.file).write_text((ROOT / mutant.file).read_text())

    def run(folder: Path, tests: object) -> int:
        planted.append((folder / mutant.file).read_text())
        return code

    monkeypatch.setattr(mutation, "copy_tree", copy)
    monkeypatch.setattr(mutation, "run_tests", run)
    found = verdict(mutant, tmp_path)
    assert (found is None) if expected is None else (found is not None and expected in found)
    assert mutant.new in planted[0] and mutant.old not in planted[0]
    (file,) = tmp_path.rglob("*.py")
    assert file.read_text() == (ROOT / mutant.file).read_text()


def test_a_text_that_is_gone_is_a_problem(tmp_path: Path) -> None:
    gone = MUTANTS[0]._replace(old="no such line")
    assert "stands 0 times" in (verdict(gone, tmp_path) or "")
