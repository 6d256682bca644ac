"""`corral submit`: a command as a job on a running Ray cluster."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import ConfigError
from jobs.command import Tool

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

COMMANDS = ("pipeline", "sft", "rm", "ppo", "tune", "serve", "evaluate")
# anchored: a bare `data` would leave out app/data as well
EXCLUDES = [
    "/.git",
    "/.venv",
    "/runs",
    "/data",
    "/docs",
    "**/__pycache__",
    "/.mypy_cache",
    "/.ruff_cache",
    "/.pytest_cache",
    "/.hypothesis",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="[COMMAND] RECIPE", help=f"COMMAND is one of {', '.join(COMMANDS)}; pipeline by default"
    )
    parser.add_argument(
        "--address", help="of the Ray dashboard, such as http://head:8265 (default: RAY_API_SERVER_ADDRESS, or this machine)"
    )
    parser.add_argument(
        "--follow", action=argparse.BooleanOptionalAction, default=True, help="stream the job's output and wait for its end"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Submit, follow, and return the job's exit code (0 or 1); raises ConfigError for a bad recipe or when no cluster answers."""
    command, path = _command_and_recipe(arguments.words)
    from app.config.loading import load_recipe

    recipe = load_recipe(path, overrides)
    words = ["python", "-m", "jobs", command, path, *overrides, f"--run.dir={Path(recipe.run.dir).absolute()}"]
    entrypoint = shlex.join(words)
    if arguments.dry_run:
        sys.stdout.write(f"{entrypoint}\n")
        return 0
    client = _client(arguments.address)
    job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": ".", "excludes": EXCLUDES})
    sys.stdout.write(f"job {job}: {entrypoint}\n")
    sys.stdout.flush()
    return _follow(client, job) if arguments.follow else 0


def _command_and_recipe(words: list[str]) -> tuple[str, str]:
    if len(words) == 1:
        return "pipeline", words[0]
    if len(words) == 2 and words[0] in COMMANDS:
        return words[0], words[1]
    raise ConfigError(f"submit takes [COMMAND] RECIPE, with COMMAND one of {', '.join(COMMANDS)}; got: {' '.join(words)}")


def _client(address: str | None) -> JobSubmissionClient:
    from jobs.local_ray import use_token

    use_token()
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"no Ray cluster answers at {address or 'the default address'} ({reason}): start one with `ray start --head`, or give --address"
        ) from error


def _follow(client: JobSubmissionClient, job: str) -> int:
    """The job's output as it comes, then its exit code. Ctrl-C stops the job too."""

    async def stream() -> None:
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        asyncio.run(stream())
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    info = client.get_job_info(job)
    sys.stdout.write(f"job {job}: {info.status}\n")
    return info.driver_exit_code or 0 if info.status == "SUCCEEDED" else info.driver_exit_code or 1


TOOL = Tool(
    purpose="run a command as a Ray job on a cluster",
    details=(
        "Packs the current folder, submits `python -m jobs COMMAND RECIPE ...` and follows its output; the exit code is the job's.\n"
        "A relative run.dir is taken relative to the current folder, so on another machine give a path that its nodes share.\n"
        "Authenticates with Ray's token (RAY_AUTH_TOKEN or ~/.ray/auth_token).\n\n"
        "example:\n  ray start --head && corral submit jobs/recipes/tiny/pipeline.toml --run.dir=/shared/demo"
    ),
    add_arguments=add_arguments,
    run=run,
)
