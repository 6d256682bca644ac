"""TRL's half of `bench/rm.py`, which starts it in TRL's own environment: one optimizer step for every line on standard input.

Answers with one JSON object a line on standard output: `{}` when ready, then for each step its seconds, pairs and tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the libraries print must not stand between the answers


def answer(value: dict[str, float]) -> None:
    ANSWERS.write(json.dumps(value) + "\n")
    ANSWERS.flush()


class OnDemand(TrainerCallback):
    """Lets a step begin when it is asked for, and tells how long it took."""

    def __init__(self, batches: Iterable[Mapping[str, float]]) -> None:
        self.batches = iter(batches)
        self.began = 0.0

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        if not sys.stdin.readline():
            raise SystemExit
        self.began = time.perf_counter()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        answer({"seconds": time.perf_counter() - self.began, **next(self.batches)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a reward model")
    parser.add_argument("--pairs", required=True, help="JSON list of [chosen ids, rejected ids], in the order of training")
    parser.add_argument("--batch", type=int, required=True, help="pairs of an optimizer step")
    parser.add_argument("--micro", type=int, required=True, help="pairs of a forward pass")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pairs = json.loads(Path(arguments.pairs).read_text())
    batches = [pairs[start : start + arguments.batch] for start in range(0, len(pairs), arguments.batch)]
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32)
    counts = [{"pairs": len(batch), "tokens": sum(len(ids) for pair in batch for ids in pair)} for batch in batches]
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                output_dir=folder,
                per_device_train_batch_size=arguments.micro,
                gradient_accumulation_steps=arguments.batch // arguments.micro,
                num_train_epochs=1,
                learning_rate=arguments.lr,
                train_sampling_strategy="sequential",
                max_length=None,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            train_dataset=Dataset.from_dict({"chosen_ids": [pair[0] for pair in pairs], "rejected_ids": [pair[1] for pair in pairs]}),
            callbacks=[OnDemand(counts)],
        )
        answer({})
        trainer.train()


if __name__ == "__main__":
    main()
