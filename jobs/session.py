"""The frame of every training command: early checks, run folder, data, Ray, tracker, and a clean end."""

from __future__ import annotations

import errno
import importlib
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.errors import CorralError, DiskError, Interrupted, first_line
from app.run_layout import LOGS, REPORT_FILE, SUMMARY_FILE

if TYPE_CHECKING:
    from app.config.recipe import Recipe
    from app.data.corpus import Corpus
    from app.run_folder import RunFolder
    from app.tracking import RunTracker


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Session:
    """What a stage function is given beside its recipe."""

    run: RunFolder
    corpus: Corpus
    tracker: RunTracker


@contextmanager
def session(recipe: Recipe, command: str) -> Iterator[Session]:
    """Everything that can be wrong with the input is found before Ray starts. Raises CorralError; Interrupted on SIGINT and SIGTERM."""
    from app.planning.placement import check_feasible
    from app.run_folder import RunFolder
    from app.trackers.opening import open_services, require_packages
    from app.tracking import RunTracker
    from app.workers.watchdog import watching
    from jobs import local_ray
    from jobs.inputs import check_inputs, doubts, read_data
    from jobs.run_storage import mirrored
    from jobs.shared_folder import require_shared

    check_feasible(recipe, command, local_ray.cluster_resources(), local_ray.cluster_nodes())
    check_inputs(recipe, command)
    require_packages(recipe.tracking)
    with mirrored(recipe) as mirror:
        run = RunFolder.open(recipe, command, fill=None if mirror is None else mirror.fill)
        with _ended(run):
            if mirror is not None:
                mirror.start(run.path)
            corpus = read_data(recipe, command, run)
            services = open_services(recipe, run.path)
            with (
                _imported_in_background("app.stages.pipeline"),  # seconds of imports while Ray's own processes start
                RunTracker(run.path, services=services) as tracker,
                local_ray.running_ray(run.path / LOGS),
                watching(run.path / LOGS, note=tracker.note, early_share=recipe.run.stacks_after),
            ):
                require_shared(run.path)
                for text in doubts(recipe, command):
                    tracker.note(text)
                yield Session(run, corpus, tracker)
    for name in (SUMMARY_FILE, REPORT_FILE):
        if (run.path / name).is_file():
            sys.stdout.write(f"{run.path / name}\n")


@contextmanager
def _ended(run: RunFolder) -> Iterator[None]:
    """Records how the block ends. Raises Interrupted for Ctrl-C."""
    from app.workers.pending import TRACE

    try:
        with _full_disk_told(run):
            yield
    except KeyboardInterrupt as error:
        _note(run, "interrupted")
        raise Interrupted(f"stopped; {_kept(run)} The same command goes on from there") from error
    except CorralError as error:
        interrupted = isinstance(error, Interrupted)
        _note(run, "interrupted" if interrupted else "failed", None if interrupted else str(error))
        if error.exit_code == CorralError.exit_code:  # a failed run, no input to mend
            with suppress(OSError):
                trace = run.path / TRACE
                trace.parent.mkdir(exist_ok=True)
                trace.write_text(traceback.format_exc())
        raise
    except BaseException as error:
        _note(run, "failed", f"{type(error).__name__}: {first_line(error)}")
        raise
    with _full_disk_told(run):
        run.end_session("finished")


@contextmanager
def _full_disk_told(run: RunFolder) -> Iterator[None]:
    """Raises DiskError where any file of the run met a disk that is full or read-only, and nobody has said which by then."""
    try:
        yield
    except CorralError:  # a deadline's is an OSError too
        raise
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise DiskError(
            f"{error.filename or run.path} cannot be written ({error.strerror}): free space there, or make it writable; "
            "the same command goes on"
        ) from error


def _note(run: RunFolder, outcome: str, reason: str | None = None) -> None:
    """`end_session` where there is room for it: on a full disk the error that is told must not be this one's."""
    with suppress(OSError):
        run.end_session(outcome, reason)


@contextmanager
def _imported_in_background(module: str) -> Iterator[None]:
    """A later import statement finds the module there, waits for it, or raises what is wrong with it."""

    def load() -> None:
        with suppress(Exception):
            importlib.import_module(module)

    thread = threading.Thread(target=load, name="corral-imports")
    thread.start()
    try:
        yield
    finally:
        thread.join()  # a process that ends in the middle of an import may crash


def _kept(run: RunFolder) -> str:
    """What is already on disk, for people."""
    done = [stage for stage in ("sft", "rm", "ppo", "evaluation") if run.results(stage) is not None]
    return f"{run.path} holds {'the finished stages ' + ', '.join(done) if done else 'no finished stage yet'} and the last checkpoint."
