"""The Ray that a command runs on: one that it starts and stops itself, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.accelerators import get_accelerator_manager_for_resource

from app.errors import ConfigError, first_line
from app.planning.packing import NodeResources
from jobs import interrupts

OBJECT_STORE_BYTES = (128 * 2**20, 4 * 2**30)
"""Least and most; Ray takes pages as it fills them. A weight push holds a whole float32 policy: one that does not fit goes by the disk."""
SHARED_MEMORY, SHARED_MEMORY_SHARE = "/dev/shm", 0.5
CONNECT_SECONDS = 10.0
WORKER_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def cluster_resources() -> dict[str, float]:
    """`CPU`, `GPU` and `memory` (bytes) of the whole cluster; of this machine where the command will start its own Ray."""
    if uses_cluster():
        join_cluster()
        return dict(ray.cluster_resources())
    return {"CPU": float(local_cpus()), "GPU": float(local_gpus()), "memory": float(psutil.virtual_memory().total)}


def cluster_nodes() -> tuple[NodeResources, ...]:
    """Every living node of the cluster; this machine where the command will start its own Ray."""
    if not uses_cluster():
        return (NodeResources(local_cpus(), local_gpus()),)
    join_cluster()
    return tuple(
        NodeResources(node["Resources"].get("CPU", 0.0), int(node["Resources"].get("GPU", 0.0)), labels=node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    )


def uses_cluster() -> bool:
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def local_cpus() -> int:
    """Logical CPUs of a Ray of our own: the cores this process may use, and at least the two that two training workers take."""
    return max(2, len(os.sched_getaffinity(0)))


def object_store_bytes() -> int:
    """Size of the object store of a Ray of our own: what is useful, and where there is little shared memory half of what is free. Where
    there is none, Ray keeps the store on the disk."""
    least, most = OBJECT_STORE_BYTES
    if not Path(SHARED_MEMORY).is_dir():
        return least
    return max(least, min(most, int(shutil.disk_usage(SHARED_MEMORY).free * SHARED_MEMORY_SHARE)))


def local_gpus() -> int:
    """GPUs as `ray.init` will count them."""
    manager = get_accelerator_manager_for_resource("GPU")
    visible = manager.get_current_process_visible_accelerator_ids()
    there = int(manager.get_current_node_num_accelerators())
    return there if visible is None else min(there, len(visible))


@contextmanager
def running_ray(logs: Path) -> Iterator[None]:
    """Ray for the length of a block; afterwards the workers' logs of a Ray of our own lie in `logs`."""
    if uses_cluster():
        join_cluster()
        session_logs = None
    else:
        os.environ.update({name: value for name, value in WORKER_ENV.items() if name not in os.environ})
        if not local_gpus():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for accelerators and warn that it found none
        try:
            # the dashboard stays on: without it Ray Train's cleaner logs an error every second
            context = ray.init(
                address="local",
                num_cpus=local_cpus(),
                object_store_memory=object_store_bytes(),
                log_to_driver=False,
                logging_level="ERROR",
            )
        except SystemExit as error:  # SIGTERM while Ray's own handler is in place
            raise KeyboardInterrupt from error
        session_logs = Path(context.address_info["session_dir"]) / "logs"
    interrupts.install()
    try:
        yield
    finally:
        with interrupts.shielded():
            try:
                if session_logs is not None:
                    keep_logs(session_logs, logs)
            except OSError as error:  # on a full disk, whose own error is more worth telling
                sys.stderr.write(f"the workers' logs could not be kept in {logs} ({first_line(error)})\n")
            finally:
                ray.shutdown()


def join_cluster() -> None:
    """Connect to RAY_ADDRESS. Raises ConfigError when nothing answers there."""
    if ray.is_initialized():
        return
    _require_answer(os.environ["RAY_ADDRESS"])
    use_token()
    environment: dict[str, Any] = {"env_vars": WORKER_ENV}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a submitted job has brought its code along as working_dir
        environment["py_modules"] = [importlib.import_module(name) for name in ("app", "serve", "jobs")]
    try:
        ray.init(runtime_env=environment, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_answer(error) from error
    interrupts.install()


def _require_answer(address: str) -> None:
    """Whether something listens at HOST:PORT, for whose answer Ray would wait minutes. Other forms of address are left to Ray."""
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(error) from error


def _no_answer(error: Exception) -> ConfigError:
    return ConfigError(
        f"RAY_ADDRESS = {os.environ['RAY_ADDRESS']}: no Ray cluster answers ({first_line(error)}): "
        "start one with `ray start --head`, check RAY_AUTH_TOKEN, or unset RAY_ADDRESS"
    )


def use_token() -> None:
    """Authenticate with Ray's token where this machine has one: an explicit address does not turn that on by itself."""
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ) or (Path.home() / ".ray" / "auth_token").is_file()
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def keep_logs(session_logs: Path, folder: Path) -> None:
    """Copy what this run's worker processes wrote, without the empty files."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("worker-*.out", "worker-*.err", "serve/*.log", "train/*.log"):
        for file in session_logs.glob(pattern):
            if file.is_file() and file.stat().st_size:
                shutil.copyfile(file, folder / file.name)
