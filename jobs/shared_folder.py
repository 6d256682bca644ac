"""Whether every node of a cluster sees the run folder: workers anywhere read models from it and write their part of a checkpoint there."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from app.errors import ConfigError, CorralError, first_line

LOOK_SECONDS = 120.0


@ray.remote(num_cpus=0, max_retries=0)
def _sees(path: str) -> bool:
    return Path(path).is_file()


def require_shared(folder: Path) -> None:
    """Ask every other node that processes may run on. Raises ConfigError that names those that do not see the folder."""
    here = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and node["Resources"].keys() & {"CPU", "GPU"}
    }
    if not others:
        return
    mark = folder / f".shared-{uuid.uuid4().hex}"
    mark.touch()
    try:
        looks = [_sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(str(mark)) for node in others]
        seen = list(zip(others.values(), ray.get(looks, timeout=LOOK_SECONDS), strict=True))
    except ray.exceptions.RayError as error:
        raise CorralError(f"a node did not answer whether it sees {folder} ({first_line(error)}): look at `ray status`") from error
    finally:
        mark.unlink()
    if problem := blind(folder, seen):
        raise ConfigError(problem)


def blind(folder: Path, seen: Sequence[tuple[str, bool]]) -> str | None:
    """What to say where a node does not see the folder; `seen`: the address of each node, and whether it does."""
    without = sorted({address for address, there in seen if not there})
    if not without:
        return None
    return (
        f"run folder {folder} is not seen from {', '.join(without)}: on several nodes run.dir must lie on a file system that all of them "
        "mount (run.storage does not replace it); choose such a --run.dir, or use one node"
    )
