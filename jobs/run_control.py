"""`corral logs` and `corral stop`: a run by its folder, or a Ray job by its name."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import ConfigError, CorralError, first_line
from app.run_layout import LOG_FILE
from jobs.command import Tool
from jobs.submission import ADDRESS_HELP, followed, names_cluster

if TYPE_CHECKING:
    from app.run_status import RunStatus
    from app.storage.place import Place
    from jobs.job_server import JobServer

JOB_PREFIX = "raysubmit_"
"""What Ray begins the id of a job with that was given none."""
LOOK_SECONDS = 1.0
STOP_SECONDS = 1800.0


@dataclass(frozen=True)
class Target:
    """What a word names: the folder of a run, or a job."""

    run: Place | None = None
    job: str | None = None


def target(word: str, address: str | None) -> Target:
    """A run folder, a URL of one, or the submission id of a job: where no address is given, only what looks like one, so that a mistyped
    folder asks no cluster. Raises ConfigError."""
    from app.storage.place import open_place

    if "://" in word or Path(word).is_dir():
        return Target(run=open_place(word, "RUN"))
    if "/" in word or word.startswith("."):
        raise ConfigError(f"{word}: no such folder; `corral runs DIR` lists the runs in a folder")
    given = address or names_cluster()
    if not given and not word.startswith(JOB_PREFIX):
        raise ConfigError(
            f"{word}: no such folder, and no job id as `corral submit` prints it ({JOB_PREFIX}...); `corral runs DIR` lists the runs in "
            "a folder, and --address=URL finds a job of any name"
        )
    return Target(job=word)


def status_of(place: Place) -> RunStatus:
    """The state of the run in a folder. Raises ConfigError where there is none."""
    from app.run_status import read_status

    try:
        status = read_status(place)
    except OSError as error:
        raise ConfigError(f"{place.url}: cannot be read ({first_line(error)}); check the path or the credentials") from error
    if status is None:
        raise ConfigError(f"{place.url}: holds no run; `corral runs DIR` lists the runs in a folder")
    return status


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN|JOB", help="a run folder or its URL, or the id of a job")
    parser.add_argument("--address", help=f"for a job: {ADDRESS_HELP}")
    parser.add_argument("--follow", action="store_true", help="go on until the run or job ends; Ctrl-C ends the showing only")


def logs(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print what a run or a job has shown; with `--follow` its exit code. Raises ConfigError."""
    _no_keys("logs", overrides)
    found = target(arguments.target, arguments.address)
    if found.run is not None:
        return _run_log(found.run, follow=arguments.follow)
    assert found.job is not None
    job = found.job
    from jobs.job_server import ask, connect

    server = connect(arguments.address)
    ask(lambda: server.get_job_info(job))
    if arguments.follow:
        return followed(server, job)
    sys.stdout.write(ask(lambda: server.get_job_logs(job)))
    return 0


def _run_log(place: Place, *, follow: bool) -> int:
    """Print `run.log`; to the run's end where asked. Returns 0, or with `follow` 1 for a run that failed and 130 for one that stopped."""

    status_of(place)
    shown = 0
    while True:
        status = status_of(place)  # before the log: what was written until the end is then surely in it
        content = place.read(LOG_FILE, shown) or b""
        sys.stdout.write(content.decode("utf-8", "replace"))
        sys.stdout.flush()
        shown += len(content)
        if not follow or status.state != "running":
            break
        time.sleep(LOOK_SECONDS)
    if not follow:
        return 0
    sys.stdout.write(f"{place.url}: {status.state}{f': {status.reason}' if status.reason else ''}\n")
    return {"finished": 0, "interrupted": 130}.get(status.state, 1)


def add_stop_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN|JOB", help="a run folder, or the id of a job")
    parser.add_argument("--address", help=f"for a job: {ADDRESS_HELP}")
    parser.add_argument(
        "--wait", type=float, default=STOP_SECONDS, metavar="SECONDS", help=f"longest wait for its end (default: {STOP_SECONDS:g})"
    )


def stop(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Ask a run or a job to stop and wait for that; 0 when it has ended. Raises ConfigError, CorralError when it does not end."""
    _no_keys("stop", overrides)
    found = target(arguments.target, arguments.address)
    if found.job is not None:
        return _stop_job(found.job, arguments.address, arguments.wait)
    assert found.run is not None
    status = status_of(found.run)
    if status.state not in ("running", "unknown"):
        sys.stdout.write(f"{status.run}: {status.state} already\n")
        return 0
    from app.process_record import host_name

    if status.alive is None:  # its number may be that of another process here
        if status.job is not None:
            return _stop_job(status.job, arguments.address, arguments.wait)
        where = status.host if status.host != host_name() else f"another machine or container of the name {status.host}"
        raise ConfigError(f"{status.run}: is run by process {status.pid} on {where}: stop it there, with the same command")
    return _stop_process(found.run, status, arguments.wait)


def _stop_process(place: Place, status: RunStatus, seconds: float) -> int:
    assert status.pid is not None
    try:
        with suppress(ProcessLookupError):  # it has just ended, which is what was asked for
            os.kill(status.pid, signal.SIGTERM)
    except PermissionError as error:
        raise ConfigError(f"{status.run}: process {status.pid} belongs to another user: stop it as that user") from error
    sys.stdout.write(f"{status.run}: process {status.pid} stops {how(status.command)}\n")
    sys.stdout.flush()
    again = "`corral stop` once more interrupts it at once, without a checkpoint"
    _wait(lambda: status_of(place).state != "running", f"process {status.pid} of {status.run}", seconds, again)
    sys.stdout.write(f"{status.run}: {status_of(place).state}; the command that started it goes on from there\n")
    return 0


def _stop_job(job: str, address: str | None, seconds: float) -> int:
    from jobs.job_server import ask, connect, outcome

    server: JobServer = connect(address)
    before = ask(lambda: server.get_job_info(job))
    if not before.status.is_terminal():
        ask(lambda: server.stop_job(job))
        given = stop_seconds(before.runtime_env)
        hard = "" if given is not None else HARD
        sys.stdout.write(f"job {job} stops {how(command_of(before.entrypoint))}{hard}\n")
        sys.stdout.flush()
        kills = f"Ray kills it {given or RAY_STOP_SECONDS} s after it was first asked to; it does not pass on a second request"
        _wait(lambda: ask(lambda: server.get_job_info(job)).status.is_terminal(), f"job {job}", seconds, kills)
    sys.stdout.write(f"{outcome(job, ask(lambda: server.get_job_info(job)))}\n")
    return 0


def how(command: str | None) -> str:
    """How a run of a command stops on SIGTERM. Trials save their checkpoints by the step and cannot be asked for one in between."""
    if command == "tune":
        return "at once; its trials go on from their last checkpoints (tune.save_every), SFT and reward model save one first"
    return "at its next safe point, with a checkpoint"


def command_of(entrypoint: str | None) -> str | None:
    """The command that a job runs, where `corral submit` wrote its entry point."""
    words = shlex.split(entrypoint or "")
    return words[3] if words[:3] == ["python", "-m", "jobs"] and len(words) > 3 else None


RAY_STOP_SECONDS = "3"
HARD = (
    f"; it was submitted without RAY_JOB_STOP_WAIT_TIME_S: Ray kills it after {RAY_STOP_SECONDS} s, and it goes on from its last checkpoint"
)


def stop_seconds(runtime_env: object) -> str | None:
    """The time that Ray gives a job of this runtime environment to stop; None where it says nothing of that."""
    variables = runtime_env.get("env_vars") if isinstance(runtime_env, dict) else None
    return variables.get("RAY_JOB_STOP_WAIT_TIME_S") if isinstance(variables, dict) else None


def _wait(done: Callable[[], bool], what: str, seconds: float, remedy: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise CorralError(f"{what} has not ended after {seconds:g} s; {remedy}")
        time.sleep(LOOK_SECONDS)


def _no_keys(name: str, overrides: list[str]) -> None:
    if overrides:
        raise ConfigError(f"corral {name} takes no recipe keys, got {overrides[0]}")


LOGS = Tool(
    purpose="show what a run or a job has printed",
    details="example:\n  corral logs runs/demo\n  corral logs raysubmit_x1 --address=http://head:8265 --follow",
    add_arguments=add_log_arguments,
    run=logs,
)
STOP = Tool(
    purpose="stop a run or a job so that it can go on later",
    details=(
        "The run ends its step, saves a checkpoint and stops; the command that started it goes on from there. Trials of a search\n"
        "stop at once and go on from their last checkpoints.\n\n"
        "example:\n  corral stop runs/demo\n  corral stop raysubmit_x1 --address=http://head:8265"
    ),
    add_arguments=add_stop_arguments,
    run=stop,
)
