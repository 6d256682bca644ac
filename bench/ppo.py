"""Speed of whole PPO iterations: rollout, scores, update, push. One epoch, one minibatch, separate critic and reward model of the
policy's size, float32, both cores; the first iteration warms up and is not counted.

Fixed lengths (default): `--batch` prompts of 16 random tokens, `--length` new tokens each with no stop token.
Natural lengths: `--prompts FILE` (a JSON string a line) through the model's chat template; answers end at the end token, or at `--length`.

    .venv/bin/python bench/ppo.py --model FOLDER --steps 8 --json
    .venv/bin/python bench/ppo.py --model FOLDER --steps 8 --peer PEERS/bin/python    # TRL takes a step after each of ours
    .venv/bin/python bench/ppo.py --model FOLDER --prompts prompts.jsonl --batch 16 --length 256

The floor is the time that the operations of an iteration take at the rate of matrix products measured between this iteration and the next:
each token sampled once, one forward pass of reward model and reference, one forward and backward pass of policy and critic.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # a script's own folder leads sys.path; the packages lie beside it

import numpy as np  # noqa: E402
import psutil  # noqa: E402

from app.config.ppo import PpoConfig  # noqa: E402
from app.config.rollout import RolloutConfig  # noqa: E402
from app.config.scoring import ScoringConfig  # noqa: E402
from app.config.shared import DeepSpeedConfig, OptimizerConfig, WorkersConfig  # noqa: E402
from app.data.prompt_stream import PromptStream  # noqa: E402
from app.experience import Experience, Prompt  # noqa: E402
from bench.flops import Shape, matrix_rate  # noqa: E402
from bench.peer import peer_steps  # noqa: E402

PROMPT_TOKENS = 16
PHASES = ("rollout", "score", "update", "push")
SERVING, LEARNING = ("ray::RolloutEngine", "ray::ServeReplica"), ("ray::LearnerWorker",)
"""Titles of the processes that share a core with --pin."""


class Recorder:
    """Tracker and checkpoint store of a benchmark: keeps metrics, saves nothing."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(metrics)

    def event(self, stage: str, step: int, text: str) -> None:
        sys.stderr.write(f"{stage}: step {step}: {text}\n")

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """A benchmark leaves no checkpoint."""

    def settle(self, *, wait_for_it: bool) -> None:
        """And so has none under way."""


@dataclass
class Turns:
    """Publisher that ends every iteration: after the push, and before anything of the next iteration begins, the machine is measured and
    the peer takes its step.

    By push, the one before the first iteration included: rates, FLOP/s of matrix products; peer_seconds; aside, seconds that belong to
    no iteration. idle: share of all cores' time, by iteration."""

    publisher: Any
    rate: Callable[[], float]
    peer: Callable[[], float] | None
    rates: list[float] = field(default_factory=list)
    peer_seconds: list[float] = field(default_factory=list)
    aside: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    _before: Any = None

    def publish(self, version: int) -> Mapping[str, float]:
        push: Mapping[str, float] = self.publisher.publish(version)
        if self._before is not None:
            after = psutil.cpu_times()
            passed = {name: getattr(after, name) - getattr(self._before, name) for name in after._fields if "guest" not in name}
            self.idle.append((passed["idle"] + passed["iowait"]) / sum(passed.values()))
        began = time.perf_counter()
        self.rates.append(self.rate())
        self.peer_seconds.append(self.peer() if self.peer else 0.0)
        self.aside.append(time.perf_counter() - began)
        self._before = psutil.cpu_times()
        return push


@dataclass
class Lengths:
    """Learner that passes everything on and remembers how long the sequences of every iteration were."""

    learner: Any
    tokens: list[list[int]] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    def update(self, experience: Experience, step: int) -> Mapping[str, float]:
        self.tokens.append(experience.tokens.attention_BS.sum(1).tolist())
        self.responses.append(int(experience.mask_BT.sum()))
        update: Mapping[str, float] = self.learner.update(experience, step=step)
        return update


def make_reward_model(model: str, folder: str) -> int:
    """A reward model of the policy's size with a random head; returns the vocabulary size."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model, num_labels=1)
    config.pad_token_id = 0
    AutoModelForSequenceClassification.from_pretrained(model, config=config, dtype=torch.float32).save_pretrained(folder)
    return int(config.vocab_size)


def shape_of(model: str) -> Shape:
    """Shape of the policy; products in this process use all cores from here on."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return Shape.of(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))


def needed_flop(shape: Shape, tokens: Sequence[int], responses: int) -> float:
    """FLOP of one iteration with every forward pass shared that can be: sampling, reference, policy thrice (forward and backward);
    reward model, critic thrice, both without the vocabulary's head."""
    return 5 * shape.forward(tokens, responses) + 4 * shape.forward(tokens, 0)


def prompts_of(arguments: argparse.Namespace, vocabulary: int) -> tuple[list[Prompt], list[int]]:
    """Prompts and end tokens."""
    if arguments.prompts is None:
        rng = np.random.default_rng(0)
        drawn = rng.integers(vocabulary, size=(4 * arguments.batch, PROMPT_TOKENS), dtype=np.int32)
        return [Prompt(str(i), "", ids) for i, ids in enumerate(drawn)], []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = [json.loads(line) for line in Path(arguments.prompts).read_text().splitlines()]
    chats = [[{"role": "user", "content": text}] for text in texts]
    rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    return [Prompt(str(i), text, np.asarray(ids, np.int32)) for i, (text, ids) in enumerate(zip(texts, rows, strict=True))], [
        tokenizer.eos_token_id
    ]


def configs(arguments: argparse.Namespace) -> tuple[PpoConfig, RolloutConfig, ScoringConfig]:
    optimizer = OptimizerConfig(lr=1e-6, eps=1e-5)
    cores = 1 if arguments.pin else len(os.sched_getaffinity(0))
    ranks = arguments.ranks
    workers = WorkersConfig(count=ranks, cpus=0.1, threads=max(1, cores // ranks))
    ppo = PpoConfig(
        steps=arguments.steps,
        batch_size=arguments.batch,
        epochs=1,
        minibatches=1,
        max_lag=arguments.lag,
        micro_batch_size=min(arguments.micro_batch, arguments.batch // ranks),
        reuse_forward=arguments.reuse and arguments.zero < 3,
        policy=optimizer,
        critic=optimizer,
        deepspeed=DeepSpeedConfig(zero_stage=arguments.zero),
        workers=workers,
    )
    engines = WorkersConfig(count=arguments.engines, cpus=0.1, threads=max(1, cores // arguments.engines))
    rollout = RolloutConfig(
        max_new_tokens=arguments.length,
        ignore_eos=arguments.prompts is None,
        engines=engines,
        kv_cache_gib=1.0,
        enforce_eager=arguments.eager,
    )
    return ppo, rollout, ScoringConfig(reward=WorkersConfig(cpus=0.1), reference=WorkersConfig(cpus=0.1))


@contextmanager
def peer(arguments: argparse.Namespace) -> Iterator[Callable[[], float] | None]:
    """A function that lets TRL take its next step and returns its seconds; None without `--peer`."""
    if arguments.peer is None:
        yield None
        return
    options = {"model": arguments.model, "steps": arguments.steps + 1, "batch": arguments.batch, "length": arguments.length}
    options |= {"micro-batch": arguments.micro_batch} | ({} if arguments.prompts is None else {"prompts": arguments.prompts})
    with peer_steps(arguments.peer, "trl_ppo.py", options, ("--turns",)) as step:
        yield step


def pin(titles: Sequence[str], core: int) -> None:
    """Keep all threads of this benchmark's processes of these titles on one core."""
    for process in psutil.Process().children(recursive=True):
        if " ".join(process.cmdline()).startswith(tuple(titles)):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {core})


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `summarise` says of the iterations."""
    from app.rewards.mix import one_reward_model
    from app.stages.actor_learner import LoopState, Parts, actor_learner_loop
    from app.workers.learner import LearnerSpec
    from app.workers.learner_group import learner_group
    from app.workers.rollout_pool import rollout_pool
    from app.workers.weight_publisher import WeightPublisher
    from jobs.local_ray import running_ray
    from serve.scoring import start_scoring

    ppo, rollout, scoring = configs(arguments)
    recorder = Recorder()
    shape = shape_of(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        reward_path = f"{folder}/reward"
        vocabulary = make_reward_model(arguments.model, reward_path)
        prompts, eos_ids = prompts_of(arguments, vocabulary)
        spec = LearnerSpec(arguments.model, reward_path, "fp32", rollout.temperature, ppo)
        longest = max(len(prompt.ids) for prompt in prompts)
        with (
            running_ray(Path(folder) / "logs"),
            rollout_pool(
                arguments.model, rollout, precision="fp32", max_prompt_length=longest, eos_ids=eos_ids, seed=0, deadline_seconds=1800
            ) as pool,
            learner_group(spec, deadline_seconds=1800) as learner,
            start_scoring(
                scoring, reward_paths=[reward_path], reference_path=arguments.model, temperature=rollout.temperature, stop_serve=False
            ) as (scorer,),
            peer(arguments) as peer_step,
        ):
            pool.ready()
            learner.ready()
            if arguments.pin:
                for core, titles in enumerate((SERVING, LEARNING)):
                    pin(titles, core)
            canaries = [np.random.default_rng(0).integers(vocabulary, size=PROMPT_TOKENS + 8, dtype=np.int32)]
            publisher = WeightPublisher(learner, pool, canaries, limit=ppo.max_logprob_mismatch)
            turns, lengths = Turns(publisher, partial(matrix_rate, shape), peer_step), Lengths(learner)
            parts = Parts(
                lengths, pool, turns, one_reward_model(scorer), scorer, recorder, recorder, PromptStream.over(prompts),
                pad_id=0, max_new_tokens=rollout.max_new_tokens,
            )  # fmt: skip
            actor_learner_loop(parts, ppo, LoopState(), seed=0)
    flop = [needed_flop(shape, tokens, responses) for tokens, responses in zip(lengths.tokens, lengths.responses, strict=True)]
    return summarise(recorder.steps, turns, lengths.responses, flop, arguments)


def summarise(
    steps: Sequence[Mapping[str, float]],
    turns: Turns,
    responses: Sequence[int],
    flop: Sequence[float],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Medians over the iterations after the first; response tokens are those that count, end token included."""
    peers, aside, rates = turns.peer_seconds[1:], turns.aside[1:], turns.rates[1:]  # the push before the first iteration belongs to none
    own = [step["seconds"] - seconds for step, seconds in zip(steps, aside, strict=True)]
    floors = [needed / rate for needed, rate in zip(flop, rates, strict=True)]

    def median(values: Sequence[float]) -> float:
        return statistics.median(values[1:] or values)

    phases = {phase: [step[f"seconds/{phase}"] for step in steps] for phase in PHASES}
    phases["push"] = [spent - seconds for spent, seconds in zip(phases["push"], aside, strict=True)]
    result: dict[str, Any] = {
        "tokens_per_second": median([count / spent for count, spent in zip(responses, own, strict=True)]),
        "samples_per_second": arguments.batch / median(own),
        "seconds_per_step": median(own),
        "phase_seconds": {phase: median(spent) for phase, spent in phases.items()},
        "phase_share": {phase: median([part / whole for part, whole in zip(spent, own, strict=True)]) for phase, spent in phases.items()},
        "idle_share": median(turns.idle),
        "mean_length": sum(responses) / len(responses) / arguments.batch,
        "matrix_gflops": median(rates) / 1e9,
        "floor_seconds": median(floors),
        "floor_share": median([floor / spent for floor, spent in zip(floors, own, strict=True)]),
        "max_logprob_mismatch": max(max(step["max_logprob_mismatch"], step["push/canary_mismatch"]) for step in steps),
    }
    if arguments.peer is not None:
        result["peer_seconds_per_step"] = median(peers)
        result["ratios"] = [theirs / ours for theirs, ours in zip(peers[1:], own[1:], strict=True)]
        result["ratio"] = statistics.median(result["ratios"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--prompts", help="file with a JSON string a line; natural lengths")
    parser.add_argument("--steps", type=int, default=8, help="PPO iterations, of which the first is not counted")
    parser.add_argument("--batch", type=int, default=64, help="prompts per iteration")
    parser.add_argument("--length", type=int, default=64, help="new tokens per prompt, with --prompts at most")
    parser.add_argument("--micro-batch", type=int, default=16, help="rollouts per forward pass of the update")
    parser.add_argument("--ranks", type=int, default=2, help="learner processes; they share the cores")
    parser.add_argument("--engines", type=int, default=2, help="rollout engines; they share the cores")
    parser.add_argument("--eager", action="store_true", help="engines do not compile their model, which takes g++")
    parser.add_argument("--zero", type=int, default=0, choices=(0, 1, 2, 3), help="ZeRO stage of the learner")
    parser.add_argument("--no-reuse", dest="reuse", action="store_false", help="run the update's forward pass again (less memory)")
    parser.add_argument("--lag", type=int, default=0, help="ppo.max_lag")
    parser.add_argument("--pin", action="store_true", help="engines and scorers on one core, learner on another, one thread each")
    parser.add_argument("--peer", help="python of an environment with requirements/peers.txt: TRL takes turns with us")
    parser.add_argument("--json", action="store_true", help="print only one JSON object")
    arguments = parser.parse_args()
    result = run(arguments)
    if not arguments.json:
        for phase, spent in result["phase_seconds"].items():
            sys.stdout.write(f"{phase:8s} {spent:7.3f} s  {result['phase_share'][phase]:5.1%}\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
