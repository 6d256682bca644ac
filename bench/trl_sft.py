"""The work of `bench/sft.py` done by TRL's SFTTrainer, in TRL's own environment (requirements/peers.txt). Started by `bench/sft.py --peer`.

Rows come from a JSON file, in the order of training: {"input_ids": [...], "labels": [...]} each, -100 where a token is no target.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl_turns import Turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--rows", required=True, type=Path, help="JSON file of tokenised rows")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="rows per optimizer step")
    parser.add_argument("--micro-batch", type=int, required=True, help="rows per forward pass")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=arguments.micro_batch,
                gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
                max_steps=arguments.steps,
                train_sampling_strategy="sequential",  # the rows are in the order of the other side
                dataset_kwargs={"skip_prepare_dataset": True},  # and tokenised
                learning_rate=1e-5,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_strategy="no",
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(json.loads(arguments.rows.read_text())),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            callbacks=[Turns(wait=True)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
