"""What the controller adds to a PPO step: the real loop, pool, learner group and weight push over actors that compute nothing.

Engines and learner ranks are Ray actors on logical nodes of one machine (`bench/fake_workers.py`), the scorer is in the controller's
process. All a step takes is control: dealing prompts, collecting responses, building the batch, credit, handing it to every rank,
publishing weights. On one machine the actors' own share is in it too, so on machines of their own it is less.

    .venv/bin/python bench/control_plane.py --engines 1 8 64 --learners 1 8 --samples 256 1024 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # a script's own folder leads sys.path; the packages lie beside it

import numpy as np  # noqa: E402

from bench.fake_workers import VOCABULARY, FakeEngine, FakeLearner, FakeScorer  # noqa: E402

PHASES = ("rollout", "score", "update", "push")
PROMPT_TOKENS = 256
DEADLINE = 300.0


@dataclass(frozen=True)
class Size:
    """engines, learners: how many actors of each take part; samples: responses per step, of `length` tokens each."""

    engines: int
    learners: int
    samples: int
    length: int


@dataclass(frozen=True)
class Control:
    """Medians over the steps. cpu_seconds: of the controller's process, all threads; stored_bytes: what a step creates in the object
    stores of all nodes, copies to other nodes included; rest: the controller's own work on a batch."""

    size: Size
    seconds: float
    cpu_seconds: float
    phases: Mapping[str, float]
    rest: float
    stored_bytes: float

    @property
    def per_sample(self) -> float:
        return self.seconds / self.size.samples


class Recorder:
    """Tracker and checkpoint store of a benchmark: keeps metrics and the processor time at each step."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []
        self.cpu = [time.process_time()]

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(metrics)
        self.cpu.append(time.process_time())

    def event(self, stage: str, step: int, text: str) -> None:
        """Constant log-probs raise alarms that mean nothing here."""

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """A benchmark leaves no checkpoint."""

    def settle(self, *, wait_for_it: bool) -> None:
        """And so has none under way."""


class FakeCluster:
    """As many actors as the largest size needs; smaller sizes use the first ones."""

    def __init__(self, engines: int, learners: int, length: int) -> None:
        import ray

        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        engine, learner = ray.remote(FakeEngine), ray.remote(FakeLearner)
        self._length = length
        self._engines = [engine.options(**options).remote(length) for _ in range(engines)]
        self._learners = [learner.options(**options).remote() for _ in range(learners)]

    def measure(self, size: Size, *, steps: int, weight_bytes: int) -> Control:
        """Run the loop for `steps` steps after a first one that is not counted."""
        import ray

        from app.config.ppo import PpoConfig
        from app.config.rollout import RolloutConfig
        from app.config.shared import WorkersConfig
        from app.data.prompt_stream import PromptStream
        from app.experience import Prompt
        from app.rewards.mix import one_reward_model
        from app.stages.actor_learner import LoopState, Parts, actor_learner_loop
        from app.workers.learner_group import RayLearner
        from app.workers.rollout_pool import VllmRolloutPool
        from app.workers.weight_publisher import WeightPublisher

        workers, recorder, scorer = self._learners[: size.learners], Recorder(), FakeScorer()
        rng = np.random.default_rng(0)
        prompts = [Prompt(str(i), "", rng.integers(VOCABULARY, size=PROMPT_TOKENS, dtype=np.int32)) for i in range(size.samples)]
        rollout = RolloutConfig(engines=WorkersConfig(count=size.engines), max_new_tokens=self._length)
        pool = VllmRolloutPool(lambda k: self._engines[k], rollout, deadline_seconds=DEADLINE, note=print)
        ranks = [worker.place.remote(rank, len(workers), weight_bytes) for rank, worker in enumerate(workers)]
        learner = RayLearner(workers, ranks, deadline_seconds=DEADLINE)
        pool.ready()
        learner.ready()
        publisher = WeightPublisher(learner, pool, [prompts[0].ids], limit=1e-3)
        config = PpoConfig(steps=1 + steps, batch_size=size.samples, micro_batch_size=1, save_every=2 + steps)
        stream = PromptStream.over(prompts)
        parts = Parts(learner, pool, publisher, one_reward_model(scorer), scorer, recorder, recorder, stream, 0, self._length)
        before = stored_bytes()
        actor_learner_loop(parts, config, LoopState(), seed=0)
        ray.get([engine.pid.remote() for engine in pool.engines])
        return summarise(size, recorder, (stored_bytes() - before) / (1 + steps))


def summarise(size: Size, recorder: Recorder, stored: float) -> Control:
    """Medians without the first step, in which learners import torch."""
    kept = recorder.steps[1:]
    phases = {phase: statistics.median(step[f"seconds/{phase}"] for step in kept) for phase in PHASES}
    rest = statistics.median(step["seconds"] - sum(step[f"seconds/{phase}"] for phase in PHASES) for step in kept)
    cpu = statistics.median(np.diff(recorder.cpu[1:]).tolist())
    return Control(size, statistics.median(step["seconds"] for step in kept), cpu, phases, rest, stored)


def stored_bytes() -> float:
    """Bytes ever created in the object stores of all nodes."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address
    from ray._private.worker import global_worker

    return float(get_memory_info_reply(get_state_from_address(global_worker.gcs_client.address)).store_stats.cumulative_created_bytes)


@contextmanager
def logical_nodes(count: int) -> Iterator[None]:
    """A Ray of several nodes, all of them this machine."""
    import ray
    from ray.cluster_utils import Cluster

    each = {"num_cpus": 1, "object_store_memory": 512 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=each)
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1, object_store_memory=each["object_store_memory"])
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def workers_memory() -> tuple[int, float]:
    """Ray's worker processes of this user and their summed PSS in MiB."""
    import psutil

    sizes = [
        process.memory_full_info().pss / 2**20
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::Fake")
    ]
    return len(sizes), sum(sizes)


def line(found: Control) -> str:
    phases = "  ".join(f"{name} {seconds:6.3f}" for name, seconds in [*found.phases.items(), ("rest", found.rest)])
    size = found.size
    return (
        f"{size.engines:4d} engines {size.learners:3d} learners {size.samples:5d} samples  {found.seconds:7.3f} s a step "
        f"({1000 * found.per_sample:6.2f} ms a sample, controller's processor {found.cpu_seconds:7.3f} s)  {phases}  "
        f"{found.stored_bytes / 2**20:8.1f} MiB stored\n"
    )


def run(arguments: argparse.Namespace) -> Sequence[Control]:
    """Every size that the options span."""
    with logical_nodes(arguments.nodes):
        began = time.perf_counter()
        cluster = FakeCluster(max(arguments.engines), max(arguments.learners), arguments.length)
        found = []
        for engines in arguments.engines:
            for learners in arguments.learners:
                for samples in arguments.samples:
                    size = Size(engines, learners, samples, arguments.length)
                    found.append(cluster.measure(size, steps=arguments.steps, weight_bytes=arguments.weights * 2**20))
                    sys.stderr.write(line(found[-1]))
        count, memory = workers_memory()
        sys.stderr.write(f"{count} actors with {memory:,.0f} MiB in all (PSS), {time.perf_counter() - began:.0f} s\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 8, 64], help="rollout actors")
    parser.add_argument("--learners", type=int, nargs="+", default=[1, 8], help="learner ranks")
    parser.add_argument("--samples", type=int, nargs="+", default=[256, 1024], help="responses per step")
    parser.add_argument("--length", type=int, default=256, help=f"tokens per response; prompts have {PROMPT_TOKENS}")
    parser.add_argument("--steps", type=int, default=3, help="steps that are counted, after a first one")
    parser.add_argument("--nodes", type=int, default=4, help="logical nodes")
    parser.add_argument("--weights", type=int, default=4, metavar="MIB", help="of each push")
    parser.add_argument("--json", action="store_true", help="also print one JSON object per size")
    arguments = parser.parse_args()
    for found in run(arguments):
        if arguments.json:
            sys.stdout.write(json.dumps(asdict(found) | {"per_sample": found.per_sample}) + "\n")


if __name__ == "__main__":
    main()
