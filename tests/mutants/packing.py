"""Sequences that stand behind each other in one row."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

COLLATE, FORWARD, SEGMENTS, PACKED = "app/data/collate.py", "app/models/forward.py", "app/models/segments.py", "app/models/packed.py"
COLLATE_TESTS, FORWARD_TESTS = ("tests/unit/data/test_collate.py",), ("tests/unit/models/test_forward.py",)
SCORING_TESTS = ("tests/unit/models/test_scoring.py",)

MUTANTS = (
    Mutant(
        "packing",
        FORWARD,
        "ids_BS[attention_BS][None], positions(attention_BS)[attention_BS][None]",
        "ids_BS[attention_BS][None], torch.arange(int(attention_BS.sum()), device=ids_BS.device)[None]",
        "positions run on from one sequence into the next",
        FORWARD_TESTS,
    ),
    Mutant(
        "packing",
        FORWARD,
        "segments = [length for length in attention_BS.sum(1).tolist() if length]",
        "segments = [int(attention_BS.sum())]",
        "a sequence sees those before it in the learner's row",
        FORWARD_TESTS,
    ),
    Mutant(
        "packing",
        SEGMENTS,
        "return ones.tril().triu(1 - width)",
        "return ones.tril().triu(-width)",
        "the window of packed rows is a token wider",
        ("tests/unit/tasks/test_sft_loss.py",),
    ),
    Mutant(
        "packing",
        PACKED,
        "    predicts_N[row.last_B] = False\n",
        "    predicts_N[-1] = False\n",
        "the last token of a sequence predicts the first of the next",
        SCORING_TESTS,
    ),
    Mutant(
        "packing",
        COLLATE,
        "targets[start + 1 : end] = torch.from_numpy(row.loss_mask[1:])",
        "targets[start:end] = torch.from_numpy(row.loss_mask)",
        "the first token of a packed thread is learnt from the end of the one before",
        COLLATE_TESTS,
    ),
    Mutant(
        "packing",
        "app/data/batch_order.py",
        "filled[emptiest] += shapes[index].tokens",
        "filled[emptiest] += shapes[index].longest",
        "packed passes hold more tokens than they may",
        ("tests/unit/data/test_batch_order.py",),
    ),
)
