"""`corral submit`: a command as a job on a running Ray cluster."""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import ConfigError
from jobs.command import Tool

if TYPE_CHECKING:
    from app.config.recipe import Recipe
    from jobs.job_server import JobServer
    from jobs.packing import Package

COMMANDS = ("pipeline", "sft", "rm", "ppo", "tune", "serve", "evaluate")
RUN_KEY = "corral_run"
"""In a job's metadata: the run folder."""
ADDRESS_HELP = "URL of the Ray dashboard, such as http://head:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine)"

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def names_cluster() -> bool:
    """Whether the environment names a cluster; `local` is a Ray of a command's own."""
    return any(os.environ.get(name, "") not in ("", "local") for name in ADDRESS_VARIABLES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "corral submit [COMMAND] RECIPE [options] [--dotted.key=value ...]"
    parser.add_argument(
        "words", nargs="+", metavar="[COMMAND] RECIPE", help=f"COMMAND is one of {', '.join(COMMANDS)}; pipeline by default"
    )
    parser.add_argument("--address", help=ADDRESS_HELP)
    parser.add_argument(
        "--follow", action=argparse.BooleanOptionalAction, default=True, help="stream the job's output and wait for its end"
    )
    parser.add_argument(
        "--install", metavar="LOCK", help="install the packages of this lock for the job, where the nodes lack them: requirements/cuda.txt"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Submit, follow, and return the job's exit code; raises ConfigError for bad input or when no cluster answers, CorralError when the
    cluster is lost."""
    command, path = _command_and_recipe(arguments.words)
    from app.config.loading import load_recipe, recipe_files
    from jobs.packing import pack

    recipe = load_recipe(path, overrides)
    package = pack(Path.cwd())
    inside, *_ = [_inside(package, file) for file in recipe_files(path)]
    words = ["python", "-m", "jobs", command, inside, *overrides, *located(recipe, package)]
    entrypoint = shlex.join(words)
    environment = runtime_environment(recipe, package, arguments.install)
    if arguments.dry_run:
        sys.stdout.write(f"{entrypoint}\n# {len(package.sizes)} files, {package.bytes / 2**20:.1f} MiB\n")
        return 0
    from jobs.job_server import ask, connect

    server = connect(arguments.address)
    metadata = {RUN_KEY: str(Path(recipe.run.dir).absolute())}
    job = ask(lambda: server.submit_job(entrypoint=entrypoint, runtime_env=environment, metadata=metadata))
    sys.stdout.write(f"job {job}: {entrypoint}\n")
    sys.stdout.flush()
    return followed(server, job) if arguments.follow else 0


def followed(server: JobServer, job: str) -> int:
    """Show a job's output until it ends; returns its exit code. Ctrl-C leaves the job running, and returns 130."""
    from jobs.job_server import exit_code, follow, outcome

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        info = follow(server, job, write)
    except KeyboardInterrupt:
        write(f"\njob {job} goes on: `corral logs {job} --follow` shows it again, `corral stop {job}` stops it\n")
        return 130
    write(f"{outcome(job, info)}\n")
    return exit_code(info)


def located(recipe: Recipe, package: Package) -> list[str]:
    """Overrides that make paths absolute: what is written, and what is there to be read and does not go along with the job."""
    from app.config.loading import toml_value
    from app.config.paths import named_paths

    overrides = []
    for named in named_paths(recipe):
        placed = [str(Path(path).expanduser().absolute()) if named.mark.written or _stays(path, package) else path for path in named.all]
        if placed != list(named.all):
            overrides.append(f"--{named.key}={placed[0] if isinstance(named.value, str) else toml_value(placed)}")
    return overrides


def _stays(path: str, package: Package) -> bool:
    """Whether a file, a folder, or anything that a glob finds, is there and does not go along."""
    here = Path(path).expanduser()
    found = [here] if here.exists() else [Path(name) for name in glob.glob(str(here), recursive=True)]
    return not all(package.holds(file) for file in found)


def runtime_environment(recipe: Recipe, package: Package, lock: str | None) -> dict[str, Any]:
    """The job's Ray runtime environment. Raises ConfigError for a lock that is none."""
    # a stopped job saves a checkpoint at the end of its step; without this Ray kills it after 3 s
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(int(recipe.run.deadline_seconds))}
    environment: dict[str, Any] = {"working_dir": str(package.root), "excludes": list(package.excludes), "env_vars": variables}
    from jobs.packing import missing_modules, packages_of

    if modules := missing_modules(package):
        environment["py_modules"] = modules
    if lock is not None:
        import importlib.metadata

        environment["uv"] = packages_of(Path(lock), importlib.metadata.version("torch").partition("+")[0])
    return environment


def _command_and_recipe(words: list[str]) -> tuple[str, str]:
    if len(words) == 1:
        return "pipeline", words[0]
    if len(words) == 2 and words[0] in COMMANDS:
        return words[0], words[1]
    raise ConfigError(f"submit takes [COMMAND] RECIPE, with COMMAND one of {', '.join(COMMANDS)}; got: {' '.join(words)}")


def _inside(package: Package, recipe: str) -> str:
    """The recipe's path as the job will find it, relative to the working directory. ConfigError where it does not go along."""
    if not package.holds(recipe):
        raise ConfigError(
            f"{recipe} does not go along with the job: put it into {package.root}, which is sent, and not under "
            "what .gitignore, .rayignore or `corral submit` leave out (runs/, data/, docs/)"
        )
    return Path(recipe).resolve().relative_to(package.root).as_posix()


TOOL = Tool(
    purpose="run a command as a Ray job on a cluster",
    details=(
        "Sends the current folder (at most 100 MiB, without run folders, data/ and what .gitignore and .rayignore name), submits\n"
        "`python -m jobs COMMAND RECIPE ...` and follows its output; the exit code is the job's. Ctrl-C only stops following:\n"
        "the job goes on, `corral logs JOB --follow` shows it again and `corral stop JOB` stops it.\n"
        "A relative run.dir is taken relative to the current folder, and so are data and models that are not sent, so on another\n"
        "machine give paths that its nodes share, or a run.storage.\n"
        "Authenticates with Ray's token (RAY_AUTH_TOKEN or ~/.ray/auth_token).\n\n"
        "example:\n  ray start --head && corral submit jobs/recipes/tiny/pipeline.toml --run.dir=/shared/demo"
    ),
    add_arguments=add_arguments,
    run=run,
)
