"""The work of `bench/rm.py` done by TRL's RewardTrainer, in TRL's own environment (requirements/peers.txt). Started by `bench/rm.py`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer
from trl_turns import Turns


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
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32)
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
            callbacks=[Turns(wait=True)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
