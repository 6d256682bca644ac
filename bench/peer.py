"""TRL beside us: a script of bench/ in TRL's own environment that takes a step whenever it is told to."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from app.workers.processes import KEEP_FREED_MEMORY, NOTHING_COMPILED

RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
OURS = {*RANKS, *KEEP_FREED_MEMORY, *NOTHING_COMPILED, "PYTHONPATH"}
"""Variables of our own processes, which its users do not set, or which would lead into our environment."""


@contextmanager
def peer_steps(python: str, script: str, options: Mapping[str, object], flags: tuple[str, ...] = ()) -> Iterator[Callable[[], float]]:
    """A function that lets `script`, next to this file, take its next step under `python` and returns its seconds.

    options: --name value; flags: options without a value.
    """
    command = [python, str(Path(__file__).with_name(script)), *flags]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdin is not None and process.stdout is not None
        turns, lines = process.stdin, process.stdout

        def step() -> float:
            turns.write("\n")
            turns.flush()
            for line in lines:
                if line.startswith('{"step_seconds"'):
                    return float(json.loads(line)["step_seconds"])
            raise SystemExit(f"{python}: TRL ended before its last step; its error is above")

        try:
            yield step
        finally:
            process.terminate()
