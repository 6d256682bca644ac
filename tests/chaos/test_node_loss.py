"""Nodes of a cluster that vanish under a PPO run: the raylet is killed, and with it every process of its node."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.config.loading import load_recipe
from app.config.recipe import Recipe
from app.data.prompt_stream import PromptStream
from app.data.templates import build_template
from app.experience import Prompt, Rollout
from app.interfaces import Scorer
from app.kept_rollouts import read_step
from app.models.load import load_tokenizer
from app.run_folder import RunFolder
from app.stages.ppo import PromptSets, open_pool, train_ppo
from app.tracking import RunTracker
from tests.tiny_models import VOCABULARY, make_neox, make_reward_model
from tests.unit.stages.pending import Done

STEPS, BATCH = 6, 8
OPTIONS = {
    "data.path": "prompts.jsonl", "run.determinism": "exact", "run.deadline_seconds": 200,
    "ppo.steps": STEPS, "ppo.batch_size": BATCH, "ppo.micro_batch_size": 2, "ppo.minibatches": 1, "ppo.save_every": 2,
    "ppo.workers.count": 2, "ppo.workers.cpus": 1,
    "rollout.max_new_tokens": 24, "rollout.kv_cache_gib": 0.1, "rollout.engines.cpus": 1, "evaluation.prompts": 4,
}  # fmt: skip


class Judge:
    """In this process: the scoring service is not what is lost here."""

    def scores(self, sequences: Sequence[Any]) -> Done:
        return Done([float((row[-4:] % 7).mean()) for row in sequences])

    def logprobs(self, sequences: Sequence[Any]) -> Done:
        return Done([np.full(len(row) - 1, -5.5, np.float32) for row in sequences])


class Saboteur(RunTracker):
    """Kills a node's raylet when a step is logged: the engines have just been given the prompts of the next one."""

    def __init__(self, run: Path, raylets: Mapping[int, int]) -> None:
        super().__init__(run)
        self.raylets = dict(raylets)
        self.notes: list[str] = []

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        super().log(stage, step, metrics)
        if stage == "ppo" and (pid := self.raylets.pop(step, None)):
            os.kill(pid, signal.SIGKILL)

    def note(self, text: str) -> None:
        super().note(text)
        self.notes.append(text)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head with room for everything, where the driver is, and two more nodes."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's sockets need a short path
    for name, value in {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    try:
        ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)  # now, so that the driver is the head's
        nodes.add_node(num_cpus=2)
        nodes.add_node(num_cpus=2)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def run(folder: Path, models: Path, places: tuple[Any, Any], raylets: Mapping[int, int]) -> Saboteur:
    """PPO with the learners and the engine in these places, as long as they exist."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    learners, engine = (NodeAffinitySchedulingStrategy(node.node_id, soft=True) for node in places)
    policy, reward = str(models / "policy"), str(models / "reward")
    given = [f"--{name}={json.dumps(value)}" for name, value in {**OPTIONS, "run.dir": str(folder), "model.path": policy}.items()]
    recipe: Recipe = load_recipe(None, given)
    template = build_template("auto", load_tokenizer(policy))
    rng = np.random.default_rng(0)
    prompts = [Prompt(str(i), "", rng.integers(4, VOCABULARY, size=5 + i % 7, dtype=np.int32)) for i in range(STEPS * BATCH + 4)]
    sets = PromptSets(PromptStream.over(prompts[:-4]), prompts[-4:], 0)

    def judge(*_: Any) -> AbstractContextManager[Sequence[Scorer]]:
        return nullcontext([Judge()])  # type: ignore[list-item]

    with (
        Saboteur(folder, raylets) as tracker,
        open_pool(recipe, policy, prompts, template.eos_id, [engine], note=tracker.note) as pool,
    ):
        train_ppo(
            recipe, RunFolder.open(recipe, "ppo"), tracker, template, sets, policy_path=policy, reward_path=reward, pool=pool,
            start_scoring=judge, learner_placement=[learners] * 2,
        )  # fmt: skip
    assert not tracker.raylets, "both nodes were killed"
    return tracker


def test_the_engines_node_and_then_the_learners_are_killed(cluster: Any, tmp_path: Path) -> None:
    """The run goes on where there is room, and ends with the same policy, from the same samples, as one that nothing happened to."""
    make_neox(tmp_path / "policy")
    make_reward_model(tmp_path / "reward", str(tmp_path / "policy"))
    first, second = sorted(cluster.worker_nodes, key=raylet)
    run(tmp_path / "straight", tmp_path, (first, second), {})
    tracker = run(tmp_path / "killed", tmp_path, (first, second), {2: raylet(second), 5: raylet(first)})
    assert [note for note in tracker.notes if note.startswith("rollout engine 0 died")]
    assert [note for note in tracker.notes if note.startswith("ppo: learner rank ")]
    assert "ppo: going on from step 4" in tracker.notes

    used = []
    for step in range(1, STEPS + 1):
        straight, killed = (rollouts(tmp_path / name, step) for name in ("straight", "killed"))
        assert [rollout.prompt.id for rollout in killed] == [rollout.prompt.id for rollout in straight]
        assert all((a.ids == b.ids).all() and (a.logprobs == b.logprobs).all() for a, b in zip(killed, straight, strict=True))
        used += [rollout.prompt.id for rollout in killed]
    assert sorted(used) == sorted(str(i) for i in range(STEPS * BATCH)), "each prompt once"
    policies = [load_file(tmp_path / name / "ppo" / "model" / "model.safetensors") for name in ("straight", "killed")]
    assert all(torch.equal(tensor, policies[1][name]) for name, tensor in policies[0].items())


def rollouts(run_folder: Path, step: int) -> Sequence[Rollout]:
    batch, _ = read_step(run_folder / "ppo" / "rollouts", step)
    return batch.rollouts
