"""Speed of whole PPO iterations: rollout, scores, update, push, on random prompts of a given model.

The work is fixed: `--batch` prompts of 16 random tokens, `--length` new tokens each with no stop token, one epoch, one minibatch,
micro-batches of 16, separate critic and reward model of the policy's size, float32.

    .venv/bin/python bench/ppo.py --model FOLDER --steps 8 --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # a script's own folder leads sys.path; the packages lie beside it

import numpy as np  # noqa: E402

from app.config.ppo import PpoConfig  # noqa: E402
from app.config.rollout import RolloutConfig  # noqa: E402
from app.config.scoring import ScoringConfig  # noqa: E402
from app.config.shared import DeepSpeedConfig, OptimizerConfig, WorkersConfig  # noqa: E402
from app.data.prompt_stream import PromptStream  # noqa: E402
from app.experience import Prompt  # noqa: E402

PROMPT_TOKENS = 16
PHASES = ("rollout", "score", "update", "push")


class Recorder:
    """Tracker and checkpoint store of a benchmark: keeps metrics, saves nothing."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(metrics)

    def event(self, stage: str, step: int, text: str) -> None:
        sys.stderr.write(f"{stage}: step {step}: {text}\n")

    def save(self, step: int, state: Mapping[str, int], write: Callable[[Path], None]) -> None:
        """A benchmark leaves no checkpoint."""


def make_reward_model(model: str, folder: str) -> int:
    """A reward model of the policy's size with a random head; returns the vocabulary size."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model, num_labels=1)
    config.pad_token_id = 0
    AutoModelForSequenceClassification.from_pretrained(model, config=config, dtype=torch.float32).save_pretrained(folder)
    return int(config.vocab_size)


def configs(arguments: argparse.Namespace) -> tuple[PpoConfig, RolloutConfig, ScoringConfig]:
    optimizer = OptimizerConfig(lr=1e-6, eps=1e-5)
    cores = len(os.sched_getaffinity(0))
    ranks = arguments.ranks
    workers = WorkersConfig(count=ranks, cpus=0.1, threads=max(1, cores // ranks))
    ppo = PpoConfig(
        steps=arguments.steps,
        batch_size=arguments.batch,
        epochs=1,
        minibatches=1,
        micro_batch_size=min(16, arguments.batch // ranks),
        reuse_forward=arguments.zero < 3,
        policy=optimizer,
        critic=optimizer,
        deepspeed=DeepSpeedConfig(zero_stage=arguments.zero),
        workers=workers,
    )
    engines = WorkersConfig(count=arguments.engines, cpus=0.1, threads=max(1, cores // arguments.engines))
    rollout = RolloutConfig(max_new_tokens=arguments.length, ignore_eos=True, engines=engines, kv_cache_gib=1.0)
    return ppo, rollout, ScoringConfig(reward=WorkersConfig(cpus=0.1), reference=WorkersConfig(cpus=0.1))


def run(arguments: argparse.Namespace) -> list[Mapping[str, float]]:
    """Metrics of every step."""
    from app.rewards.mix import one_reward_model
    from app.stages.actor_learner import LoopState, Parts, actor_learner_loop
    from app.workers.learner import LearnerSpec
    from app.workers.learner_group import learner_group
    from app.workers.rollout import rollout_pool
    from app.workers.weight_transfer import WeightPublisher
    from jobs.local_ray import running_ray
    from serve.scoring import start_scoring

    ppo, rollout, scoring = configs(arguments)
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        reward_path = f"{folder}/reward"
        vocabulary = make_reward_model(arguments.model, reward_path)
        rng = np.random.default_rng(0)
        prompts = [Prompt(str(i), "", rng.integers(vocabulary, size=PROMPT_TOKENS, dtype=np.int32)) for i in range(4 * arguments.batch)]
        spec = LearnerSpec(arguments.model, reward_path, "fp32", rollout.temperature, ppo)
        with (
            running_ray(Path(folder) / "logs"),
            rollout_pool(
                arguments.model, rollout, precision="fp32", max_prompt_length=PROMPT_TOKENS, eos_ids=[], seed=0, deadline_seconds=600
            ) as pool,
            learner_group(spec, deadline_seconds=600) as learner,
            start_scoring(
                scoring, reward_paths=[reward_path], reference_path=arguments.model, temperature=rollout.temperature, stop_serve=False
            ) as (scorer,),
        ):
            pool.ready()
            learner.ready()
            canaries = [rng.integers(vocabulary, size=PROMPT_TOKENS + 8, dtype=np.int32)]
            publisher = WeightPublisher(learner, pool, canaries, limit=ppo.max_logprob_mismatch, nccl_tensor_parallel=None)
            parts = Parts(
                learner,
                pool,
                publisher,
                one_reward_model(scorer),
                scorer,
                recorder,
                recorder,
                PromptStream.over(prompts),
                pad_id=0,
                max_new_tokens=rollout.max_new_tokens,
            )
            actor_learner_loop(parts, ppo, LoopState(), seed=0)
    return recorder.steps


def summarise(steps: list[Mapping[str, float]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates from the median iteration after the first; the first one warms caches up."""
    measured = steps[1:] or steps
    seconds = statistics.median(step["seconds"] for step in measured)
    phases = {phase: statistics.median(step[f"seconds/{phase}"] for step in measured) for phase in PHASES}
    return {
        "tokens_per_second": arguments.batch * arguments.length / seconds,
        "samples_per_second": arguments.batch / seconds,
        "seconds_per_step": seconds,
        "phase_seconds": phases,
        "phase_share": {phase: spent / seconds for phase, spent in phases.items()},
        "max_logprob_mismatch": max(max(step["max_logprob_mismatch"], step["push/canary_mismatch"]) for step in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--steps", type=int, default=8, help="PPO iterations, of which the first is not counted")
    parser.add_argument("--batch", type=int, default=64, help="prompts per iteration")
    parser.add_argument("--length", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--ranks", type=int, default=2, help="learner processes; they share the cores")
    parser.add_argument("--engines", type=int, default=2, help="rollout engines; they share the cores")
    parser.add_argument("--zero", type=int, default=0, choices=(0, 1, 2, 3), help="ZeRO stage of the learner")
    parser.add_argument("--json", action="store_true", help="print only one JSON object")
    arguments = parser.parse_args()
    result = summarise(run(arguments), arguments)
    if not arguments.json:
        for phase, spent in result["phase_seconds"].items():
            sys.stdout.write(f"{phase:8s} {spent:7.3f} s  {result['phase_share'][phase]:5.1%}\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
