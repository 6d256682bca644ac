"""Memory that `corral plan` expects of a training worker, beside what one takes: peak above an idle worker, on a CPU.

One process per model: it trains a small model first, so that libraries, threads and process group are there (that is the idle worker),
then one of the named shape with random weights through the DeepSpeed engine of `corral sft`: two optimizer steps of two micro-batches.
The peak is the kernel's own (`VmHWM`), reset in between. A lone worker in float32 trains with ZeRO 0 where 1 or 2 is asked for; in bf16,
which CPUs compute slowly, it does not.

    .venv/bin/python bench/plan_memory.py --shapes pythia-70m smollm2-135m pythia-160m
    .venv/bin/python bench/plan_memory.py --shapes pythia-70m --precision bf16 --zero 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # a script's own folder leads sys.path; the packages lie beside it

from app.config.shared import DeepSpeedConfig, OptimizerConfig, WorkersConfig  # noqa: E402
from app.planning.memory import WIDTHS, Batch, Trained, total, training_memory  # noqa: E402
from app.planning.shapes import SHAPES, ModelShape  # noqa: E402

MIB = 2**20
ACCUMULATION, STEPS = 2, 2


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, such as VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def language_model(shape: ModelShape) -> Any:
    """A model of that shape with random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
    }
    if shape.kind == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0))
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=shape.kv_heads))


def train(shape: ModelShape, ds: DeepSpeedConfig, precision: str, rows: int, length: int) -> None:
    """Two optimizer steps on random tokens, each of which is a target."""
    import torch

    from app.models.load import DTYPES
    from app.tasks.sft import TargetLoss
    from app.workers.deepspeed_engine import backward_scaled, optimizer_step, start_engine

    options = {"precision": precision, "micro_batch_size": rows, "accumulation": ACCUMULATION, "total_steps": STEPS}
    model = TargetLoss(language_model(shape).to(DTYPES[precision]))
    engine = start_engine(model, OptimizerConfig(), ds, **options)  # type: ignore[arg-type]
    ids = torch.randint(0, shape.vocabulary, (1, rows * length))
    positions = torch.arange(length).repeat(rows)[None]
    for _ in range(STEPS * ACCUMULATION):
        backward_scaled(engine, engine(ids, positions, positions > 0) / (rows * length))
        optimizer_step(engine)


def measure(shape: ModelShape, ds: DeepSpeedConfig, precision: str, rows: int, length: int, threads: int) -> int:
    """Peak above an idle worker, bytes; in a process that has done nothing else."""
    import torch

    from app.workers.deepspeed_engine import import_deepspeed

    torch.set_num_threads(threads)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    train(SHAPES["pythia-14m"].scaled(1_000_000), ds, precision, 1, 16)
    idle = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    train(shape, ds, precision, rows, length)
    return status_bytes("VmHWM") - idle


def expected(shape: ModelShape, ds: DeepSpeedConfig, precision: str, rows: int, length: int) -> dict[str, int]:
    """What the plan says for the same worker."""
    model = Trained(shape, shape.parameters, shape.parameters, Batch(rows, length, rows * (length - 1)))
    return training_memory([model], ds.in_effect(precision, 1), width=WIDTHS[precision], ranks=1, on_gpu=False).working


def in_own_process(arguments: argparse.Namespace, name: str, zero: int) -> int:
    """`measure` in the environment that a worker of ours starts in."""
    from app.workers.processes import process_environment

    words = [sys.executable, __file__, "--one", "--shapes", name, "--zero", str(zero), "--rows", str(arguments.rows)]
    words += ["--length", str(arguments.length), "--threads", str(arguments.threads), "--precision", arguments.precision]
    environment = os.environ | process_environment(WorkersConfig(threads=arguments.threads))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["pythia-70m", "smollm2-135m", "pythia-160m"], choices=SHAPES)
    parser.add_argument("--zero", nargs="+", type=int, default=[1], help="ZeRO stages")
    parser.add_argument("--precision", default="fp32", choices=WIDTHS)
    parser.add_argument("--rows", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    configs = {zero: DeepSpeedConfig(zero_stage=zero) for zero in arguments.zero}
    if arguments.one:
        (zero,) = arguments.zero
        print(measure(SHAPES[arguments.shapes[0]], configs[zero], arguments.precision, arguments.rows, arguments.length, arguments.threads))
        return
    print("| model | precision | ZeRO | parameters | expected, MiB | measured, MiB | expected / measured | expected parts, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.shapes:
        for zero, ds in configs.items():
            parts = expected(SHAPES[name], ds, arguments.precision, arguments.rows, arguments.length)
            taken = in_own_process(arguments, name, zero)
            shown = ", ".join(f"{part} {size // MIB}" for part, size in parts.items() if size)
            row = [name, arguments.precision, zero, f"{SHAPES[name].parameters:,}", total(parts) // MIB, taken // MIB]
            print(f"| {' | '.join(map(str, [*row, f'{total(parts) / taken:.2f}', shown]))} |", flush=True)


if __name__ == "__main__":
    main()
