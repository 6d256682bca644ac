"""Speed of supervised fine-tuning, and its share of the cores' matrix-product rate; with `--peer`, beside TRL's SFTTrainer.

One worker in this process runs the training loop of `corral sft` (DeepSpeed engine, packing, micro-batches by length) in float32 on the
conversations of `--data`. Rounds alternate: one optimizer step of ours, matrix products, one step of TRL's on the same rows.

    .venv/bin/python bench/sft.py --model FOLDER --data trees.jsonl --steps 6 --peer PEERS/bin/python --json
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # a script's own folder leads sys.path; the packages lie beside it

from app.config.recipe import Recipe  # noqa: E402
from app.config.shared import WorkersConfig  # noqa: E402
from app.workers.processes import process_environment  # noqa: E402
from bench.flops import FORWARD_FORMULA, Shape, matrix_rate, timed  # noqa: E402
from bench.peer import peer_steps  # noqa: E402

FLOP_FORMULA = f"3 x ({FORWARD_FORMULA})"


class Quiet:
    """Tracker, event channel and sender of a benchmark: nobody listens."""

    def __init__(self, *_: Any) -> None:
        self.sender = self

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None: ...

    def begin(self, stage: str, total_steps: int) -> None: ...

    def end(self, stage: str) -> None: ...

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def stop_requested(self) -> bool:
        return False


class Found(BaseException):
    """Carries the job that the SFT stage made out of `fit`, before it starts any process."""


def training_job(arguments: argparse.Namespace, folder: Path) -> Any:
    """The `TrainingJob` that `corral sft` would hand to its worker."""
    from app.data.corpus import load_corpus
    from app.run_folder import RunFolder
    from app.stages.preparation import prepare
    from app.stages.sft import train_sft

    sft = {"max_steps": arguments.steps + 1, "epochs": 1000, "batch_size": arguments.batch, "micro_batch_size": arguments.micro_batch}
    sft |= {"workers": {"threads": arguments.threads}, "optimizer": {"lr": 1e-5}, "deepspeed": {"zero_stage": arguments.zero}}
    data = {"path": arguments.data, "max_length": arguments.length}
    recipe = Recipe.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"path": arguments.model},
            "data": data,
            "sft": {**sft, "packing": arguments.packing},
        }
    )
    run = RunFolder.open(recipe, "sft")
    corpus = load_corpus(recipe.data, seed=recipe.run.seed, folder=run.stage("data"))

    def catch(job: Any, folder: Path) -> None:
        raise Found(job)

    with patch.multiple("app.workers.training", EventChannel=Quiet, _trainer=catch):
        try:
            train_sft(recipe, run, Quiet(), prepare(recipe, run, corpus))  # type: ignore[arg-type]
        except Found as found:
            return found.args[0]
    raise AssertionError("the SFT stage trains no more by app.workers.training.fit")


@contextmanager
def peer(arguments: argparse.Namespace, model: str, steps: list[list[Any]], folder: Path) -> Iterator[Callable[[], float] | None]:
    """A function that lets TRL take its next step and returns its seconds; None without `--peer`."""
    if arguments.peer is None:
        yield None
        return
    rows = [
        {"input_ids": row.ids.tolist(), "labels": [int(i) if hit else -100 for i, hit in zip(row.ids, row.loss_mask, strict=True)]}
        for step in steps
        for row in step
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    options = {"model": model, "rows": folder / "rows.json", "steps": len(steps), "batch": arguments.batch}
    options |= {"micro-batch": arguments.micro_batch, "threads": arguments.threads}
    with peer_steps(arguments.peer, "trl_sft.py", options) as step:
        yield step


class RowOrder:
    """Stands in front of `step_rows` and remembers what it said."""

    def __init__(self, original: Callable[..., list[int]]) -> None:
        self.original = original

    def __call__(self, step: int, **options: Any) -> list[int]:
        self.options = options
        self.indices = self.original(step, **options)
        return self.indices


def rounds(arguments: argparse.Namespace, job: Any, folder: Path) -> list[dict[str, float]]:
    """One entry per round after the first, which warms caches up."""
    from app.data.batch_order import step_rows
    from app.workers import training_loop

    loop, order = training_loop.TrainingLoop(job), RowOrder(step_rows)
    shape = Shape.of(loop.engine.module.language_model)
    measured: list[dict[str, float]] = []
    with patch.object(training_loop, "step_rows", order):
        loop.train_step()
        steps = [[loop.train_rows[i] for i in order.original(step, **order.options)] for step in range(job.steps)]
        with peer(arguments, job.task.model_path, steps, folder) as peer_step:
            if peer_step is not None:
                peer_step()
            for rows in steps[1:]:
                entry = {"seconds": timed(loop.train_step)}
                assert [loop.train_rows[i].ids.tolist() for i in order.indices] == [row.ids.tolist() for row in rows]
                entry |= {"tokens": float(sum(len(row.ids) for row in rows)), "flop": training_flop(shape, rows)}
                entry["matrix_rate"] = matrix_rate(shape)
                if peer_step is not None:
                    entry["peer_seconds"] = peer_step()
                measured.append(entry)
                if not arguments.json:
                    sys.stderr.write(json.dumps(entry) + "\n")
    return measured


def training_flop(shape: Shape, rows: list[Any]) -> float:
    """Forward and backward over rows of the token cache."""
    return 3 * shape.forward([len(row.ids) for row in rows], sum(int(row.loss_mask[1:].sum()) for row in rows))


def summarise(measured: list[dict[str, float]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds; the ratio and the model-FLOP use are medians of each round's own."""

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(entry) for entry in measured)

    result: dict[str, Any] = {
        "tokens_per_second": median(lambda e: e["tokens"] / e["seconds"]),
        "matrix_gflops": median(lambda e: e["matrix_rate"]) / 1e9,
        "flop_per_token": sum(e["flop"] for e in measured) / sum(e["tokens"] for e in measured),
        "flop_formula": FLOP_FORMULA,
        "model_flop_use": median(lambda e: e["flop"] / e["seconds"] / e["matrix_rate"]),
        "rounds": len(measured),
        "threads": arguments.threads,
    }
    if arguments.peer is not None:
        result["peer_tokens_per_second"] = median(lambda e: e["tokens"] / e["peer_seconds"])
        result["ratio"] = median(lambda e: e["peer_seconds"] / e["seconds"])
    return result


def run(arguments: argparse.Namespace) -> list[dict[str, float]]:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    with socket.socket() as free, tempfile.TemporaryDirectory() as name:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        folder = Path(name)
        job = training_job(arguments, folder)
        trainer = TorchTrainer(partial(rounds, arguments, job, folder), scaling_config=ScalingConfig(num_workers=0))  # in this process
        measured: list[dict[str, float]] = trainer.fit().return_value
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--data", required=True, help="conversations: anything that data.path takes")
    parser.add_argument("--steps", type=int, default=6, help="rounds that count; one more warms up")
    parser.add_argument("--batch", type=int, default=8, help="threads per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8, help="threads per forward pass")
    parser.add_argument("--length", type=int, default=512, help="longest thread in tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="compute threads of either side")
    parser.add_argument("--zero", type=int, default=1, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--no-packing", dest="packing", action="store_false", help="one padded row per thread")
    parser.add_argument("--peer", help="python of an environment with requirements/peers.txt: measure TRL beside it")
    parser.add_argument("--json", action="store_true", help="print only one JSON object")
    arguments = parser.parse_args()
    environment = process_environment(WorkersConfig(threads=arguments.threads))  # read by libc and OpenMP at the start of a process
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})
    result = summarise(run(arguments), arguments)
    if not arguments.json:
        for name, value in result.items():
            sys.stdout.write(f"{name:24s} {value:.4g}\n" if isinstance(value, float) else f"{name:24s} {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
