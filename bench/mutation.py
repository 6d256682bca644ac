"""Plant every mutant of tests/mutants/ in a copy of the tree, one at a time, and see that its tests notice (`make mutants`).

    python -m bench.mutation            # all of them, one process per core
    python -m bench.mutation kl clip    # of these kinds

Exit code 1, with the reason, when a mutant survives, its text is not found exactly once, or its tests fail without it.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("app", "tests", "jobs", "serve", "pyproject.toml")
SECONDS = 180
"""A mutant may turn a loop endless: its tests are then stopped, which counts as noticed."""
PASSED, FAILED = 0, 1  # of pytest; other codes mean that it could not run the tests


def occurrences(mutant: Mutant, root: Path = ROOT) -> int:
    """How often the text to replace stands in its file; 0 where there is no such file."""
    file = root / mutant.file
    return file.read_text().count(mutant.old) if file.is_file() else 0


def copy_tree(folder: Path) -> Path:
    """What tests need, in a new `folder`."""
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        else:
            shutil.copy(source, folder / name)
    return folder


def run_tests(folder: Path, tests: Sequence[str]) -> int:
    """pytest's exit code for `tests` of the tree in `folder`, in a fork of this process, which has imported the libraries but not `app`;
    -SIGALRM where they took too long."""
    child = os.fork()
    if child == 0:
        os._exit(_in_fork(folder, tests))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _in_fork(folder: Path, tests: Sequence[str]) -> int:
    import pytest

    signal.alarm(SECONDS)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "bench")]:
        del sys.modules[name]  # they are this tree's
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def verdict(mutant: Mutant, temporary: Path) -> str | None:
    """What is wrong with the mutant or its tests; None where they notice it. Every process has a copy of the tree under `temporary`."""
    found = occurrences(mutant)
    if found != 1:
        return f"its text stands {found} times in {mutant.file}, not once"
    folder = temporary / str(os.getpid())
    if not folder.is_dir():
        copy_tree(folder)
    file = folder / mutant.file
    original = file.read_text()
    file.write_text(original.replace(mutant.old, mutant.new))
    try:
        code = run_tests(folder, mutant.tests)
    finally:
        file.write_text(original)
    if code == PASSED:
        return "survives: no test fails"
    return None if code in (FAILED, -signal.SIGALRM) else f"its tests could not be run (pytest ended with {code})"


def unmutated_failures(mutants: Sequence[Mutant], folder: Path) -> list[str]:
    """Test files that fail as the tree stands: they would notice anything."""
    files = sorted({test for mutant in mutants for test in mutant.tests})
    return [] if run_tests(folder, files) == PASSED else [file for file in files if run_tests(folder, [file]) != PASSED]


def main(kinds: Sequence[str], processes: int) -> int:
    """Exit code."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401  # all of them once here, not in every fork

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # a mutant of the same size within the same second would be taken for its original
    chosen = [mutant for mutant in MUTANTS if not kinds or mutant.kind in kinds]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        if broken := unmutated_failures(chosen, copy_tree(Path(temporary) / "unmutated")):
            print(f"these tests fail without any mutant: {', '.join(broken)}")
            return 1
        with get_context("fork").Pool(processes) as pool:
            problems = pool.starmap(verdict, [(mutant, Path(temporary)) for mutant in chosen], chunksize=1)
    for mutant, problem in zip(chosen, problems, strict=True):
        print(f"{'noticed ' if problem is None else 'PROBLEM '} {mutant.kind:12} {mutant.breaks}{f' [{problem}]' if problem else ''}")
    survivors = sum(problem is not None for problem in problems)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants noticed in {time.perf_counter() - began:.0f} s")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*sorted({mutant.kind for mutant in MUTANTS}), []])
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    sys.exit(main(arguments.kinds, arguments.processes))
