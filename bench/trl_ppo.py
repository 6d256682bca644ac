"""The work of `bench/ppo.py` done by TRL's PPO, in TRL's own environment (requirements/peers.txt), for interleaved comparisons.

PEERS/bin/python bench/trl_ppo.py --model FOLDER --steps 8
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl_turns import Turns

PROMPT_TOKENS = 16


class ResponseCounter:
    """Stands in front of the trainer's `truncate_response` and adds up the tokens that count, end token included."""

    def __init__(self) -> None:
        self.original, self.tokens = ppo_trainer.truncate_response, 0

    def __call__(self, stop_token_id: int, pad_token_id: int, responses: torch.Tensor) -> torch.Tensor:
        stopped = (responses == stop_token_id).int().cumsum(1) - (responses == stop_token_id).int()
        self.tokens += int((stopped == 0).sum())
        return self.original(stop_token_id, pad_token_id, responses)


def prompts_of(arguments: argparse.Namespace, vocabulary: int) -> tuple[list[list[int]], Any]:
    """Token ids of every prompt, and the tokenizer."""
    if arguments.prompts is None:
        words = {str(i): i for i in range(vocabulary)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
        )
        generator = torch.Generator().manual_seed(0)
        return torch.randint(2, vocabulary, (4 * arguments.batch, PROMPT_TOKENS), generator=generator).tolist(), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chats = [[{"role": "user", "content": json.loads(line)}] for line in Path(arguments.prompts).read_text().splitlines()]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"], tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", help="file with a JSON string a line; natural lengths")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--turns", action="store_true", help="begin each iteration when a line comes in on standard input")
    arguments = parser.parse_args()
    policy = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = AutoConfig.from_pretrained(arguments.model, num_labels=1)
    config.pad_token_id = 0
    reward = AutoModelForSequenceClassification.from_pretrained(arguments.model, config=config, dtype=torch.float32)
    rows, tokenizer = prompts_of(arguments, config.vocab_size)
    turns, counter = Turns(wait=arguments.turns), ResponseCounter()
    ppo_trainer.truncate_response = counter
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=arguments.micro_batch,
                gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
                num_mini_batches=1,
                num_ppo_epochs=1,
                total_episodes=arguments.steps * arguments.batch,
                local_rollout_forward_batch_size=arguments.batch,
                response_length=arguments.length,
                stop_token=None if arguments.prompts is None else "eos",
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
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            eval_dataset=Dataset.from_dict({"input_ids": rows[:16]}),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[turns],
        )
        trainer.train()
    median = statistics.median(turns.seconds[1:] or turns.seconds)
    tokens = counter.tokens / len(turns.seconds) if counter.tokens else arguments.batch * arguments.length
    result = {"tokens_per_second": tokens / median, "seconds_per_step": median, "mean_length": tokens / arguments.batch}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
