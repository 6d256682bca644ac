"""Checks of the machine that the command runs on, and of the Ray that it would use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from app.errors import CorralError
from jobs.diagnosis.check import Check
from jobs.diagnosis.judging import Locks, judge_node
from jobs.diagnosis.node_report import normalised, this_node

IMPORTS = "import torch, vllm, deepspeed, ray, transformers"
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def machine_checks(locks: Locks, disks: Mapping[str, str]) -> Iterator[Check]:
    """The cheap ones first."""
    from jobs import local_ray

    yield from judge_node(this_node("127.0.0.1", disks, local_ray.local_gpus()), locks)
    yield imports()


def pinned() -> Locks:
    """What the locks beside the package ask for."""
    return Locks(*(_versions(REQUIREMENTS / name) for name in ("cpu.txt", "cuda.txt")))


def _versions(lock: Path) -> dict[str, str]:
    text = lock.read_text() if lock.is_file() else ""
    return {normalised(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def disks_of(run_dir: str | None, temporary: str | None = None) -> dict[str, str]:
    """What fills disks: run folders, Ray's logs and spilled objects, downloaded models."""
    models = os.environ.get("HF_HOME", "~/.cache/huggingface")
    temporary = temporary or os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return {"run folders": run_dir or str(Path.cwd()), "temporary files": temporary, "models": models}


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
