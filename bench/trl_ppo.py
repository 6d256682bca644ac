"""The work of `bench/ppo.py` done by TRL's PPO, in TRL's own environment (requirements/peers.txt), for interleaved comparisons.

PEERS/bin/python bench/trl_ppo.py --model FOLDER --steps 8 --json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
    default_data_collator,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

PROMPT_TOKENS = 16


class StepClock(TrainerCallback):
    """Seconds between the ends of iterations."""

    def __init__(self) -> None:
        self.ends: list[float] = [time.perf_counter()]

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_train_begin(self, *arguments: Any, **more: Any) -> None:
        self.ends = [time.perf_counter()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="for symmetry with bench/ppo.py; the last line is JSON either way")
    arguments = parser.parse_args()
    policy = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = AutoConfig.from_pretrained(arguments.model, num_labels=1)
    config.pad_token_id = 0
    reward = AutoModelForSequenceClassification.from_pretrained(arguments.model, config=config, dtype=torch.float32)
    words = {str(i): i for i in range(config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="0", eos_token="1")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, config.vocab_size, (4 * arguments.batch, PROMPT_TOKENS), generator=generator)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=arguments.batch // 16,
                num_mini_batches=1,
                num_ppo_epochs=1,
                total_episodes=arguments.steps * arguments.batch,
                local_rollout_forward_batch_size=arguments.batch,
                response_length=arguments.length,
                num_sample_generations=0,
                learning_rate=1e-6,
                temperature=1.0,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
            ),
            processing_class=tokenizer,
            model=policy,
            ref_model=copy.deepcopy(policy),
            reward_model=reward,
            value_model=copy.deepcopy(reward),
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
            eval_dataset=Dataset.from_dict({"input_ids": ids[:16].tolist()}),
            data_collator=default_data_collator,
            callbacks=[clock],
        )
        trainer.train()
    seconds = [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]
    median = statistics.median(seconds[1:] or seconds)
    result = {"tokens_per_second": arguments.batch * arguments.length / median, "seconds_per_step": median}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
