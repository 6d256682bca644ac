"""Speed of reward-model training on ranked groups, beside TRL's RewardTrainer on the same pairs of the same groups.

Optimizer steps of Corral and of TRL alternate on the same cores: same model, float32, tokens (natural lengths), AdamW, threads.
A step of Corral takes whole groups, one of TRL as many pairs as they have on average, in random order. The first step of each
is not counted. `--plain` adds Corral without the shared prefix.

    .venv/bin/python bench/rm.py --model FOLDER --data TREES --peer PEERS/bin/python --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # a script's own folder leads sys.path; the packages lie beside it

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from app.config.data import DataConfig  # noqa: E402
from app.config.shared import DeepSpeedConfig, OptimizerConfig, WorkersConfig  # noqa: E402
from app.config.training import RewardModelConfig  # noqa: E402
from app.data.corpus import load_corpus  # noqa: E402
from app.data.encoding import Cuts, encode_groups  # noqa: E402
from app.data.templates import build_template  # noqa: E402
from app.data.token_cache import GroupRow  # noqa: E402
from app.models.heads import init_reward_model, save_reward_model  # noqa: E402
from app.models.load import load_tokenizer  # noqa: E402
from app.models.packed import pack_sequences  # noqa: E402
from app.tasks.reward_model import RewardModelTask  # noqa: E402
from app.workers.deepspeed_engine import backward_scaled, optimizer_step, start_engine  # noqa: E402
from app.workers.processes import process_environment  # noqa: E402
from bench.peer import peer_steps  # noqa: E402

LEARNING_RATE = 1e-5


class Step(NamedTuple):
    """What one optimizer step took and did; `computed` are the tokens that went through the linear layers, without padding."""

    seconds: float
    pairs: int
    sequences: int
    tokens: int
    computed: int


def read_groups(arguments: argparse.Namespace, folder: Path) -> list[GroupRow]:
    """All groups of the data, of at most --replies replies, in random order."""
    config = DataConfig(path=arguments.data, max_length=arguments.max_length)
    corpus = load_corpus(config, seed=0, folder=folder)
    template = build_template("auto", load_tokenizer(arguments.model))
    rows = list(encode_groups((*corpus.train.groups, *corpus.validation.groups), template, config, 0, Cuts()))
    random.Random(0).shuffle(rows)
    return [GroupRow(row.id, row.sequences[: arguments.replies]) for row in rows]


def pairs_of(rows: Sequence[GroupRow]) -> list[list[list[int]]]:
    """[chosen ids, rejected ids] of every pair of every group."""
    return [[ids.tolist() for ids in pair] for row in rows for pair in itertools.combinations(row.sequences, 2)]


def corral_steps(arguments: argparse.Namespace, rows: Sequence[GroupRow], *, share_prefix: bool) -> Iterator[Step]:
    """One optimizer step on --groups of the rows each time, as the training loop makes it."""
    accumulation = arguments.groups // arguments.micro
    task = RewardModelTask(Path(), arguments.model, 0, False, RewardModelConfig(share_prefix=share_prefix))
    engine = start_engine(
        task.build_model(),
        OptimizerConfig(lr=LEARNING_RATE),
        DeepSpeedConfig(),
        precision="fp32",
        micro_batch_size=arguments.micro,
        accumulation=accumulation,
        total_steps=arguments.steps,
    )
    engine.train()
    for start in range(0, len(rows), arguments.groups):
        batch = sorted(rows[start : start + arguments.groups], key=lambda row: task.shape(row).longest)
        parts = [batch[first : first + arguments.micro] for first in range(0, arguments.groups, arguments.micro)]
        began = time.perf_counter()
        for number, part in enumerate(parts):
            if number:
                optimizer_step(engine)
            backward_scaled(engine, task.loss(engine, part, torch.device("cpu")) / arguments.groups)
        optimizer_step(engine)
        seconds = time.perf_counter() - began
        tokens = sum(task.shape(row).tokens for row in batch)
        packed = [pack_sequences([ids for row in part for ids in row.sequences]).ids_1N.numel() for part in parts]
        yield Step(seconds, len(pairs_of(batch)), sum(len(row.sequences) for row in batch), tokens, sum(packed) if share_prefix else tokens)


@contextmanager
def trl_steps(arguments: argparse.Namespace, reward_model: Path, rows: Sequence[GroupRow]) -> Iterator[Iterator[Step]]:
    """Optimizer steps of TRL on all pairs of the rows, in a process of its own; the first --groups rows are the first steps."""
    pairs = []
    for part in (rows[: arguments.groups], rows[arguments.groups :]):
        chosen = pairs_of(part)
        random.Random(0).shuffle(chosen)
        pairs += chosen
    micro = arguments.peer_micro
    batch = max(1, round(len(pairs) * arguments.groups / len(rows) / micro)) * micro
    batches = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
    file = reward_model.with_name("pairs.json")
    file.write_text(json.dumps(pairs))
    options = {"model": reward_model, "pairs": file, "batch": batch, "micro": micro, "lr": LEARNING_RATE, "threads": arguments.threads}
    with peer_steps(arguments.peer, "trl_rm.py", options) as step:
        counts = [(len(part), sum(len(ids) for pair in part for ids in pair)) for part in batches]
        yield (Step(step(), count, 2 * count, tokens, tokens) for count, tokens in counts)


def alternate(lanes: dict[str, Iterator[Step]]) -> dict[str, list[Step]]:
    """Steps of all lanes in turn until each has run out, without the first of each; a lane that has run out is passed over."""
    done: dict[str, list[Step]] = {name: [] for name in lanes}
    waiting = dict(lanes)
    while waiting:
        for name, lane in list(waiting.items()):
            step = next(lane, None)
            if step is None:
                del waiting[name]
            else:
                done[name].append(step)
                sys.stderr.write(f"{name}: {step.pairs} pairs in {step.seconds:.1f} s\n")
    return {name: steps[1:] for name, steps in done.items()}


def rates(steps: Sequence[Step], weights: int, matrix_flops: float) -> dict[str, float]:
    """Per second over all steps, and the share of a matrix product's rate that the linear layers' 6 FLOP a weight and token reach."""
    total = Step(*map(sum, zip(*steps, strict=True)))
    return {
        "pairs_per_second": total.pairs / total.seconds,
        "sequences_per_second": total.sequences / total.seconds,
        "tokens_per_second": total.tokens / total.seconds,
        "computed_per_second": total.computed / total.seconds,
        "matrix_rate_share": 6 * weights * total.computed / total.seconds / matrix_flops,
    }


def matrix_rate(size: int = 1024, repeats: int = 20) -> float:
    """FLOP/s of a float32 matrix product."""
    a = torch.randn(size, size)
    best = min(_seconds(lambda: a @ a) for _ in range(repeats))
    return 2 * size**3 / best


def _seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
        rows = read_groups(arguments, folder)[: (1 + arguments.steps) * arguments.groups]
        model = init_reward_model(arguments.model, seed=0)
        weights = sum(p.numel() for p in model.base_model.parameters()) - model.base_model.get_input_embeddings().weight.numel()
        save_reward_model(model, load_tokenizer(arguments.model), folder / "reward", reward_offset=0.0)
        del model
        lanes = {"corral": corral_steps(arguments, rows, share_prefix=True)}
        if arguments.plain:
            lanes["plain"] = corral_steps(arguments, rows, share_prefix=False)
        with trl_steps(arguments, folder / "reward", rows) as trl:
            done = alternate({**lanes, "trl": trl})
        dist.destroy_process_group()
    flops = matrix_rate()
    result: dict[str, Any] = {lane: rates(steps, weights, flops) for lane, steps in done.items()}
    result["ratio"] = result["corral"]["pairs_per_second"] / result["trl"]["pairs_per_second"]
    return {**result, "matrix_gflops": flops / 1e9, "groups": len(rows) - arguments.groups, "pairs": sum(s.pairs for s in done["corral"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--data", required=True, help="file of conversation trees or ranked groups")
    parser.add_argument("--peer", required=True, help="Python of an environment with TRL (requirements/peers.txt)")
    parser.add_argument("--steps", type=int, default=8, help="counted optimizer steps of Corral; TRL sees the same pairs")
    parser.add_argument("--groups", type=int, default=2, help="groups of an optimizer step")
    parser.add_argument("--micro", type=int, default=2, help="groups of a forward pass")
    parser.add_argument("--peer-micro", type=int, default=4, help="pairs of a forward pass of TRL")
    parser.add_argument("--replies", type=int, default=5, help="most replies of a group")
    parser.add_argument("--max-length", type=int, default=512, help="most tokens of a sequence")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--plain", action="store_true", help="also measure Corral without the shared prefix")
    parser.add_argument("--json", action="store_true", help="print only one JSON object")
    arguments = parser.parse_args()
    environment = process_environment(WorkersConfig(threads=arguments.threads))
    if not environment.items() <= os.environ.items():  # what training workers have from their start
        os.execve(sys.executable, [sys.executable, str(ROOT / "bench" / "rm.py"), *sys.argv[1:]], {**os.environ, **environment})
    result = run(arguments)
    if not arguments.json:
        for lane in ("corral", "plain", "trl"):
            if lane in result:
                columns = "  ".join(f"{name} {value:9.3f}" for name, value in result[lane].items())
                sys.stdout.write(f"{lane:7s} {columns}\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
