"""`corral doctor`: whether this machine can run Corral."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.errors import CorralError
from jobs.command import Tool

PYTHONS = ((3, 11), (3, 12))
MIN_SHM_GIB = 0.5
MIN_DISK_GIB = 5.0
IMPORTS = "import torch, vllm, deepspeed, ray, transformers"
BREAKS_TRANSFORMERS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Check:
    """One finding; `remedy` where it failed."""

    name: str
    finding: str
    remedy: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="also check whether `corral COMMAND RECIPE` fits this machine or RAY_ADDRESS"
    )
    parser.add_argument(
        "--for", dest="purpose", default="pipeline", metavar="COMMAND", help="the command to check RECIPE for (default: pipeline)"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print every check; 1 when one failed."""
    failed = 0
    for check in checks(arguments.recipe, arguments.purpose, overrides):
        failed += check.remedy is not None
        verdict = "ok    " if check.remedy is None else "FAILED"
        sys.stdout.write(f"{verdict} {check.name}: {check.finding}{f' - {check.remedy}' if check.remedy else ''}\n")
        sys.stdout.flush()
    return min(failed, 1)


def checks(recipe: str | None, command: str, overrides: list[str]) -> Iterator[Check]:
    """The cheap ones first."""
    fits = sys.version_info[:2] in PYTHONS
    yield Check("python", platform.python_version(), None if fits else "use Python 3.11 or 3.12")
    yield Check("cores", f"{len(os.sched_getaffinity(0))}, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}")
    yield _free("shared memory", Path("/dev/shm"), MIN_SHM_GIB, "enlarge /dev/shm (docker run --shm-size=2g)")
    yield _free("disk", Path.cwd(), MIN_DISK_GIB, "free some space")
    yield versions()
    yield unwanted_packages()
    yield imports()
    yield ray_answers()
    if recipe is not None:
        yield feasibility(recipe, command, overrides)


def _free(name: str, path: Path, least_gib: float, remedy: str) -> Check:
    if not path.exists():
        return Check(name, f"no {path}", remedy)
    free = shutil.disk_usage(path).free / 2**30
    return Check(name, f"{free:.1f} GiB free in {path}", None if free >= least_gib else f"{remedy}; {least_gib:g} GiB are needed")


def versions() -> Check:
    """Installed versions against the lock that belongs to the installed vLLM."""
    is_cuda = importlib.util.find_spec("vllm") is not None and _installed("vllm") is not None
    lock = Path(__file__).resolve().parents[1] / "requirements" / ("cuda.txt" if is_cuda else "cpu.txt")
    if not lock.is_file():
        return Check("versions", "no requirements/ beside the package; not compared")
    wanted = dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.MULTILINE))
    wrong = [f"{name} {_installed(name) or 'missing'} (lock: {version})" for name, version in wanted.items() if _installed(name) != version]
    shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    remedy = f"pip install --no-deps -r requirements/{lock.name}" if wrong else None
    return Check("versions", shown or f"{len(wanted)} packages as in requirements/{lock.name}", remedy)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unwanted_packages() -> Check:
    """Packages whose builds do not match torch's and then break the import of transformers."""
    found = [name for name in BREAKS_TRANSFORMERS if _installed(name)]
    remedy = f"pip uninstall {' '.join(found)}" if found else None
    return Check("packages that break transformers", ", ".join(found) or "none", remedy)


def imports() -> Check:
    """The large libraries together, in a clean process."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check("imports", IMPORTS.removeprefix("import "))
    return Check("imports", done.stderr.strip().splitlines()[-1], "remove .venv and run `make setup`")


def ray_answers() -> Check:
    """Whether RAY_ADDRESS is a cluster; without it, what a Ray of our own would have."""
    from jobs import local_ray

    where = f"cluster {os.environ['RAY_ADDRESS']}" if local_ray.uses_cluster() else "of our own"
    try:
        have = local_ray.cluster_resources()
    except CorralError as error:
        return Check("ray", str(error), "see there")
    return Check("ray", f"{where}: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs, {have['memory'] / 2**30:.1f} GiB")


def feasibility(path: str, command: str, overrides: list[str]) -> Check:
    """Whether the recipe parses and its placement fits."""
    from app.config.loading import load_recipe
    from app.planning.placement import check_feasible
    from jobs import local_ray

    try:
        check_feasible(load_recipe(path, overrides), command, local_ray.cluster_resources(), local_ray.cluster_nodes())
    except CorralError as error:
        return Check("recipe", str(error), "see there")
    return Check("recipe", f"corral {command} {path} fits")


TOOL = Tool(
    purpose="check this machine, its packages and, with a recipe, whether the recipe fits",
    details="Prints one line per check; the exit code is 0 when none failed.\n\nexample:\n  corral doctor jobs/recipes/tiny/pipeline.toml",
    add_arguments=add_arguments,
    run=run,
)
