"""Sequences that stand behind each other in one row."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

COLLATE, FORWARD, SEGMENTS, PACKED = "app/data/collate.py", "app/models/forward.py", "app/models/segments.py", "app/models/packed.py"
COLLATE_TESTS, FORWARD_TESTS = ("tests/unit/data/test_collate.py",), ("tests/unit/models/test_forward.py",)
SCORING_TESTS, PACKED_TESTS = ("tests/unit/models/test_scoring.py",), ("tests/unit/models/test_packed.py",)

MUTANTS = (
    Mutant(
        "packing",
        PACKED,
        "[np.arange(shared, len(sequences[index])) for index, shared in placed]",
        "[np.arange(len(sequences[index]) - shared) for index, shared in placed]",
        "own tokens count their positions from 0, whatever they share",
        PACKED_TESTS,
    ),
    Mutant(
        "packing",
        PACKED,
        "    segments = [Segment(len(ids), shared) for ids, (_, shared) in zip(own, placed, strict=True)]\n",
        "    segments = [Segment(len(ids_N))]\n",
        "a sequence sees those before it in its row",
        FORWARD_TESTS,
    ),
    Mutant(
        "packing",
        PACKED,
        "limit = min(len(before), len(other) - 1)",
        "limit = min(len(before), len(other))",
        "two sequences that are the same leave one of them no token",
        PACKED_TESTS,
    ),
    Mutant(
        "packing",
        SEGMENTS,
        "dtype=torch.bool, device=device).tril(shared)",
        "dtype=torch.bool, device=device).tril(shared + 1)",
        "behind shared tokens each sees the next one",
        PACKED_TESTS,
    ),
    Mutant(
        "packing",
        SEGMENTS,
        "seen_sS.triu(shared + 1 - width)",
        "seen_sS.triu(shared - width)",
        "the window of packed rows is a token wider",
        PACKED_TESTS,
    ),
    Mutant(
        "packing",
        FORWARD,
        "    predicts_M[row.ends_B] = False\n",
        "    predicts_M[-1] = False\n",
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
        "filled[emptiest] += cost",
        "filled[emptiest] += len(bundle)",
        "packed passes hold more tokens than they may",
        ("tests/unit/data/test_batch_order.py",),
    ),
)
