"""Rows of the stages: what is cut, what is counted, and what stands before them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config.data import DataConfig
from app.data.encoding import check_system_options, cut_counts, encode_groups, encode_prompts, encode_threads
from app.data.templates import Template, build_template, prepare_tokenizer
from app.errors import ConfigError
from app.formats.records import Message, PromptItem, RankedGroup, Thread
from tests.tiny_models import make_tokenizer

QUESTION, ANSWER = Message("user", "Why?"), Message("assistant", "Because.")
LONG = Thread("long", "long", (QUESTION, ANSWER) * 12)


def make_template() -> Template:
    tokenizer = make_tokenizer()
    prepare_tokenizer(tokenizer, oasst=True)
    return build_template("oasst", tokenizer)


TEMPLATE = make_template()
IDS, MASK = TEMPLATE.encode(LONG.messages, open_assistant=False)


def config(max_length: int, **options: Any) -> DataConfig:
    return DataConfig(max_length=max_length, max_prompt_length=max_length, **options)


def threads(count: int) -> list[Thread]:
    return [Thread(f"t{k}", f"t{k}", LONG.messages) for k in range(count)]


def test_a_head_ends_where_it_is_cut() -> None:
    encoded = encode_threads([LONG], TEMPLATE, config(12), 1)
    (row,) = encoded.rows
    assert row.ids.tolist() == IDS[:12]
    assert row.loss_mask.tolist() == MASK[:12]
    assert row.ids[-1] != TEMPLATE.eos_id  # within the answer: the model does not learn to stop there
    assert (encoded.truncated, encoded.left_out) == (1, 0)


def test_threads_without_a_target_are_counted() -> None:
    short = Thread("s", "s", (QUESTION, ANSWER))
    shouted = Thread("l", "l", (Message("user", "Why? " * 20), ANSWER))
    encoded = encode_threads([short, shouted, LONG], TEMPLATE, config(32), 1)
    assert (len(encoded.rows), encoded.truncated, encoded.left_out) == (2, 1, 1)
    assert cut_counts(encoded, encoded) == {"truncated": 2, "left_out": 2}


def test_windows_are_stretches_of_the_thread_with_its_mask() -> None:
    """Uniform over all places that hold a target behind their first token; the mask is that of the whole thread."""
    rows = encode_threads(threads(600), TEMPLATE, config(8, overlong="window", window_probability=1.0), 1).rows
    places: Counter[int] = Counter()
    for row in rows:
        start = next(
            k for k in range(len(IDS) - 7) if IDS[k : k + 8] == row.ids.tolist() and [False, *MASK[k + 1 : k + 8]] == row.loss_mask.tolist()
        )
        places[start] += 1
        assert row.loss_mask.any()
    period = len(IDS) // 12
    fruitful = {k for k in range(period) if any(MASK[k + 1 : k + 8])}  # equal stretches are found at their first place
    assert set(places) == fruitful and len(fruitful) < period
    assert max(places.values()) < 2.5 * min(places.values())


def test_share_of_windows() -> None:
    rows = encode_threads(threads(1000), TEMPLATE, config(60, overlong="window", window_probability=0.8), 1).rows
    heads = sum(row.ids.tolist() == IDS[:60] for row in rows)
    assert heads / 1000 == pytest.approx(0.2 + 0.8 * 12 / (len(IDS) - 59), abs=0.08)


def test_windows_depend_on_seed_and_record_alone() -> None:
    options = config(16, overlong="window")

    def rows(seed: int, items: list[Thread]) -> dict[str, list[int]]:
        return {item.id: row.ids.tolist() for item, row in zip(items, encode_threads(items, TEMPLATE, options, seed).rows, strict=True)}

    items = threads(30)
    assert rows(1, items) == rows(1, items[::-1])
    assert rows(1, items) != rows(2, items)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=6), room=st.integers(8, 60), mode=st.sampled_from(["head", "window"]))
def test_every_row_has_a_target_or_is_counted(lengths: list[int], room: int, mode: str) -> None:
    messages = tuple(Message("assistant" if k % 2 else "user", "x" * length) for k, length in enumerate(lengths))
    ids, mask = TEMPLATE.encode(messages, open_assistant=False)
    encoded = encode_threads([Thread("t", "t", messages)], TEMPLATE, config(room, overlong=mode, window_probability=1.0), 1)
    assert len(encoded.rows) + encoded.left_out == 1
    assert encoded.left_out == (not any(mask[1:room]) if mode == "head" else not any(mask))
    for row in encoded.rows:
        assert len(row.ids) == len(row.loss_mask) == min(room, len(ids))
        assert row.loss_mask[1:].any() and not row.loss_mask[0]


def test_training_on_all_tokens_but_the_first() -> None:
    (row,) = encode_threads([Thread("t", "t", (QUESTION, ANSWER))], TEMPLATE, config(64, train_on="all"), 1).rows
    assert row.loss_mask.tolist() == [False] + [True] * (len(row.ids) - 1)


def test_raw_text_ends_in_eos_and_long_text_is_cut() -> None:
    texts = [Thread(name, name, (Message("text", content),)) for name, content in (("a", "abc"), ("b", "abcdefghijkl"))]
    encoded = encode_threads(texts, TEMPLATE, config(8), 1)
    assert [TEMPLATE.tokenizer.decode(row.ids) for row in encoded.rows] == ["abc<|endoftext|>", "abcdefgh"]
    assert [row.loss_mask.tolist() for row in encoded.rows] == [[False, *[True] * 3], [False, *[True] * 7]]
    assert (encoded.truncated, encoded.left_out) == (1, 0)
    windows = encode_threads([Thread(str(k), "t", texts[1].messages) for k in range(50)], TEMPLATE, config(8, overlong="window"), 1)
    assert any(row.ids[-1] == TEMPLATE.eos_id for row in windows.rows)


def test_prefix_stands_before_every_sequence_within_its_limit() -> None:
    options = config(24, system_prefix="Be.")
    prefix, _ = TEMPLATE.encode([Message("system", "Be.")], open_assistant=False)
    assert TEMPLATE.tokenizer.decode(prefix) == "<|system|>Be.<|endoftext|>"
    own = Thread("own", "own", (Message("system", "Hm."), QUESTION, ANSWER))
    cut, whole = encode_threads([LONG, own], TEMPLATE, config(40, system_prefix="Be."), 1).rows
    assert cut.ids.tolist() == prefix + IDS[:35]
    assert cut.loss_mask.tolist() == [False] * 5 + MASK[:35]
    assert TEMPLATE.tokenizer.decode(whole.ids).startswith("<|system|>Be.<|endoftext|><|system|>Hm.<|endoftext|><|prompter|>")
    assert not whole.loss_mask[:16].any() and whole.loss_mask[17:].all()
    (everything,) = encode_threads([LONG], TEMPLATE, config(24, system_prefix="Be.", train_on="all"), 1).rows
    assert everything.loss_mask.tolist() == [False] * 6 + [True] * 18
    prompt, _ = TEMPLATE.encode(LONG.messages[:3], open_assistant=True)
    (row,) = encode_groups([RankedGroup("g", "g", LONG.messages[:3], ("Yes.", "No."))], TEMPLATE, options, 1).rows
    assert row.sequences[0].tolist() == [*prefix, *prompt[-14:], *TEMPLATE.encode_text("Yes."), TEMPLATE.eos_id]
    assert [len(sequence) for sequence in row.sequences] == [24, 24]
    encoded = encode_prompts([PromptItem("p", "p", LONG.messages[:3])], TEMPLATE, options)
    assert encoded.rows[0].ids.tolist() == prefix + prompt[-19:]
    assert encoded.truncated == 1


def test_prefix_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.system_prefix leaves fewer than 4 of data\.max_prompt_length = 8 tokens"):
        check_system_options(TEMPLATE, DataConfig(max_prompt_length=8, system_prefix="Be kind."))


def test_groups_that_the_cut_makes_the_same_are_left_out() -> None:
    alike = RankedGroup("a", "a", (QUESTION,), ("x" * 30 + "y", "x" * 30 + "z"))
    longer = RankedGroup("b", "b", (QUESTION,), ("x" * 30, "No."))
    short = RankedGroup("c", "c", (QUESTION,), ("Yes.", "No."))
    encoded = encode_groups([alike, longer, short], TEMPLATE, config(24), 1)
    assert [row.id for row in encoded.rows] == ["b", "c"]
    assert (encoded.truncated, encoded.left_out) == (1, 1)
    assert all(sequence[-1] == TEMPLATE.eos_id for row in encoded.rows for sequence in row.sequences)
    assert all(sequence.dtype == np.int32 for row in encoded.rows for sequence in row.sequences)
