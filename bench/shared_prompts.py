"""What it saves to compute the prompt of several samples once: forward and backward passes of a policy, in turns with and without.

python -m bench.shared_prompts --model FOLDER --prompt 100 --response 48 --prompts 4 --samples 4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

import numpy as np
import torch

from app.experience import FinishReason, Prompt, Rollout, TokenBatch
from app.models import packed
from app.models.load import load_causal_lm
from app.models.policy import PolicyModel
from app.models.segments import attend_by_segment

NEVER = 10**9
"""Common tokens that no two sequences have."""


def rollouts(vocabulary: int, given: argparse.Namespace) -> TokenBatch:
    """Random tokens; each prompt as often as it has samples."""
    draw = np.random.default_rng(0)
    made = []
    for number in range(given.prompts):
        prompt = Prompt(str(number), "", draw.integers(0, vocabulary, given.prompt, dtype=np.int32))
        for sample in range(given.samples):
            ids = draw.integers(0, vocabulary, given.response, dtype=np.int32)
            nothing = np.zeros(len(ids), np.float32)
            made.append(Rollout(prompt, sample, ids, nothing, FinishReason.LENGTH, nothing.astype(np.int32)))
    return TokenBatch.from_rollouts(made, pad_id=0)


def seconds(policy: PolicyModel, tokens: TokenBatch) -> float:
    """Of one forward and backward pass."""
    policy.zero_grad()
    began = time.perf_counter()
    logprobs_BT, _, _ = policy(tokens.ids_BS, tokens.attention_BS, tokens.prompt_lengths_B, tokens.mask_BT, 1.0)
    logprobs_BT.sum().backward()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=48, help="tokens of a response")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=5, help="after a first one, which is not counted")
    given = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    policy = PolicyModel(load_causal_lm(given.model))
    if not attend_by_segment(policy.language_model):
        raise SystemExit(f"{given.model}: its sequences cannot stand in one row")
    tokens = rollouts(policy.language_model.config.get_text_config().vocab_size, given)
    once: list[float] = []
    each: list[float] = []
    least = packed.LEAST_SHARED
    computed = packed.pack_sequences([ids[attended].numpy() for ids, attended in zip(tokens.ids_BS, tokens.attention_BS, strict=True)])
    for _ in range(1 + given.rounds):
        for common, spent in ((least, once), (NEVER, each)):
            packed.LEAST_SHARED = common
            spent.append(seconds(policy, tokens))
    ratios = [slow / fast for fast, slow in zip(once[1:], each[1:], strict=True)]
    result = {
        "tokens": int(tokens.attention_BS.sum()),
        "tokens_computed": computed.ids_1N.numel(),
        "seconds_once": statistics.median(once[1:]),
        "seconds_each": statistics.median(each[1:]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
