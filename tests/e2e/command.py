"""`python -m jobs ...` as a user's shell would run it, with its whole process tree in view."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
SHRUNKEN, MINIMAL = "tests/e2e/shrunken.toml", "tests/e2e/minimal.toml"
RUN_SECONDS = 900
NODE_AGENTS = ("ray::RuntimeEnvAgent", "ray::DashboardAgent")


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a Ray that tests of other folders may have pointed to."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_"))}
    return kept | more


def start(
    arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None, *, inside: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """The command in the background, output and errors in `log`. inside: words that run a command somewhere else."""
    words = [*inside, sys.executable, "-m", "jobs", *arguments]
    with log.open("ab") as out:
        return subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=dict(env or environment()))


def run(arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """(exit code, output) of the command."""
    process = start(arguments, log, env)
    code = process.wait(RUN_SECONDS)
    return code, log.read_text()


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the command has printed `text`; fails when it ends first."""
    wait_until(lambda: text in log.read_text(), repr(text), seconds=RUN_SECONDS, pause=0.2, process=process, log=log)


def interrupt(process: subprocess.Popen[bytes], number: signal.Signals) -> int:
    """Send a signal, wait for the command to end, and require that no process of its tree is left. Returns the exit code."""
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    code = process.wait(RUN_SECONDS)
    require_gone(tree)
    return code


def kill_driver(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """SIGKILL for the command itself. Returns the processes that it leaves behind, without the agents of Ray's node: these see later
    that the node is gone, and know no run folder."""
    tree = psutil.Process(process.pid).children(recursive=True)
    left_behind = [child for child in tree if not " ".join(child.cmdline()).startswith(NODE_AGENTS)]
    process.kill()
    process.wait()
    return left_behind


def kill_actor(process: subprocess.Popen[bytes], kind: str) -> None:
    """SIGKILL for one of the command's actors of this class."""
    children = psutil.Process(process.pid).children(recursive=True)
    *_, last = [child for child in children if " ".join(child.cmdline()).startswith(f"ray::{kind}")]
    last.kill()


def require_gone(tree: Sequence[psutil.Process], seconds: float = 30) -> None:
    """Every process of the list ends by itself."""
    _, alive = psutil.wait_procs(tree, timeout=seconds)
    assert not alive, [(process.pid, process.name()) for process in alive]
