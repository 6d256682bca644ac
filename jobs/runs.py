"""`corral runs`: run folders, and the jobs of a Ray cluster, with their state."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table

from app.errors import ConfigError, first_line
from jobs.command import Tool, console
from jobs.submission import ADDRESS_HELP, RUN_KEY, names_cluster

JOB_STATES = {"PENDING": "pending", "RUNNING": "running", "SUCCEEDED": "finished", "FAILED": "failed", "STOPPED": "interrupted"}
FILE_WIDTH = 240
"""Characters that a line of a table may take where it goes to no terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "place", nargs="?", default="runs", metavar="DIR|URL", help="a run folder, or a folder of run folders (default: runs)"
    )
    parser.add_argument("--address", help=f"also list the jobs of this cluster: {ADDRESS_HELP}")
    parser.add_argument("--json", action="store_true", help="print one JSON object: runs, jobs")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the runs, and the jobs where a cluster is named. Raises ConfigError."""
    if overrides:
        raise ConfigError(f"corral runs takes no recipe keys, got {overrides[0]}")
    asked = arguments.address is not None or names_cluster()
    runs = list_runs(arguments.place)
    jobs = list_jobs(arguments.address) if asked else []
    if arguments.json:
        sys.stdout.write(json.dumps({"runs": runs, "jobs": jobs}, indent=2) + "\n")
        return 0
    show(runs, jobs, now=time.time())
    return 0


def list_runs(place: str) -> list[dict[str, Any]]:
    """The runs in a folder or URL as JSON-able objects. Raises ConfigError."""
    from app.run_status import find_runs
    from app.storage.place import open_place

    try:
        return [status.as_dict() for status in find_runs(open_place(place, "DIR"))]
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read ({first_line(error)}); check the path or the credentials") from error


def list_jobs(address: str | None) -> list[dict[str, Any]]:
    """The jobs of a cluster that came through its job server, newest first, as JSON-able objects. Raises ConfigError."""
    from jobs.job_server import ask, connect

    server = connect(address)
    jobs = [job_row(job.dict()) for job in ask(server.list_jobs) if job.submission_id is not None]
    return sorted(jobs, key=lambda job: -(job["started"] or 0.0))


def job_row(job: Mapping[str, Any]) -> dict[str, Any]:
    """What `corral runs --json` says about a job; times in unix seconds, as for runs."""

    def seconds(milliseconds: float | None) -> float | None:
        return None if milliseconds is None else milliseconds / 1000

    return {
        "job": job["submission_id"],
        "state": JOB_STATES[str(getattr(job["status"], "value", job["status"]))],
        "run": (job.get("metadata") or {}).get(RUN_KEY),
        "entrypoint": job["entrypoint"],
        "started": seconds(job.get("start_time")),
        "ended": seconds(job.get("end_time")),
        "exit_code": job.get("driver_exit_code"),
    }


def show(runs: Sequence[Mapping[str, Any]], jobs: Sequence[Mapping[str, Any]], now: float) -> None:
    """Runs and jobs as tables."""
    out = console()
    if not out.is_terminal:
        out.width = FILE_WIDTH
    if not runs and not jobs:
        out.print("no runs there; `corral runs DIR` looks in another folder, --address also lists the jobs of a cluster")
    if runs:
        table = Table(*(Column(name, overflow="fold") for name in ("run", "state", "command", "stage", "active", "where", "why")), box=None)
        for each in runs:
            where = each["job"] or (f"{each['host']}:{each['pid']}" if each["host"] else "")
            active = "" if each["active"] is None else ago(now - each["active"])
            table.add_row(each["run"], each["state"], each["command"] or "", stage_text(each), active, where, each["reason"] or "")
        out.print(table)
    if jobs:
        table = Table(*(Column(name, overflow="fold") for name in ("job", "state", "started", "run or command")), box=None)
        for each in jobs:
            started = "" if each["started"] is None else ago(now - each["started"])
            table.add_row(each["job"], each["state"], started, each["run"] or each["entrypoint"])
        out.print(table)


def stage_text(run: Mapping[str, Any]) -> str:
    """`ppo 12/500`; before the first stage, nothing.

    >>> stage_text({"stage": "ppo", "step": 12, "steps": 500}), stage_text({"stage": None})
    ('ppo 12/500', '')
    """
    return "" if run["stage"] is None else f"{run['stage']} {run['step']}/{run['steps']}"


def ago(seconds: float) -> str:
    """`4m 05s ago`."""
    from app.display import duration

    return f"{duration(max(0.0, seconds))} ago"


TOOL = Tool(
    purpose="list runs, and the jobs of a cluster, with their state",
    details=(
        "A run is running, finished, interrupted (stopped on request), failed, killed (ended without a word), unknown (on another\n"
        "host, and silent for longer than run.deadline_seconds) or unreadable. All but finished ones go on with the command that\n"
        "started them.\n\n"
        "example:\n  corral runs runs\n  corral runs s3://bucket/runs --address=http://head:8265 --json"
    ),
    add_arguments=add_arguments,
    run=run,
)
