"""Rows of the stages: what is cut, what is counted, and what stands before them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config.data import DataConfig
from app.data.encoding import Cuts, check_system_options, encode_groups, encode_prompts, encode_threads
from app.data.templates import Template, build_template, prepare_tokenizer
from app.data.token_cache import SftRow
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


def rows_of(items: list[Thread], options: DataConfig, seed: int = 1) -> tuple[list[SftRow], Cuts]:
    cuts = Cuts()
    return list(encode_threads(items, TEMPLATE, options, seed, cuts)), cuts


def threads(count: int) -> list[Thread]:
    return [Thread(f"t{k}", f"t{k}", LONG.messages) for k in range(count)]


def test_a_head_ends_where_it_is_cut() -> None:
    (row,), cuts = rows_of([LONG], config(12))
    assert row.ids.tolist() == IDS[:12]
    assert row.loss_mask.tolist() == MASK[:12]
    assert row.ids[-1] != TEMPLATE.eos_id  # within the answer: the model does not learn to stop there
    assert cuts == Cuts(truncated=1, left_out=0)


def test_threads_without_a_target_are_counted() -> None:
    short = Thread("s", "s", (QUESTION, ANSWER))
    shouted = Thread("l", "l", (Message("user", "Why? " * 20), ANSWER))
    rows, cuts = rows_of([short, shouted, LONG], config(32))
    assert len(rows) == 2
    assert cuts.as_dict() == {"truncated": 1, "left_out": 1}


def test_windows_are_stretches_of_the_thread_with_its_mask() -> None:
    """Uniform over all places that hold a target behind their first token; the mask is that of the whole thread."""
    rows, _ = rows_of(threads(600), config(8, overlong="window", window_probability=1.0))
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
    rows, _ = rows_of(threads(1000), config(60, overlong="window", window_probability=0.8))
    heads = sum(row.ids.tolist() == IDS[:60] for row in rows)
    assert heads / 1000 == pytest.approx(0.2 + 0.8 * 12 / (len(IDS) - 59), abs=0.08)


def test_windows_depend_on_seed_and_record_alone() -> None:
    options = config(16, overlong="window")

    def rows(seed: int, items: list[Thread]) -> dict[str, list[int]]:
        return {item.id: row.ids.tolist() for item, row in zip(items, rows_of(items, options, seed)[0], strict=True)}

    items = threads(30)
    assert rows(1, items) == rows(1, items[::-1])
    assert rows(1, items) != rows(2, items)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=6), room=st.integers(8, 60), mode=st.sampled_from(["head", "window"]))
def test_every_row_has_a_target_or_is_counted(lengths: list[int], room: int, mode: str) -> None:
    messages = tuple(Message("assistant" if k % 2 else "user", "x" * length) for k, length in enumerate(lengths))
    ids, mask = TEMPLATE.encode(messages, open_assistant=False)
    rows, cuts = rows_of([Thread("t", "t", messages)], config(room, overlong=mode, window_probability=1.0))
    assert len(rows) + cuts.left_out == 1
    assert cuts.left_out == (not any(mask[1:room]) if mode == "head" else not any(mask))
    for row in rows:
        assert len(row.ids) == len(row.loss_mask) == min(room, len(ids))
        assert row.loss_mask[1:].any() and not row.loss_mask[0]


def test_training_on_all_tokens_but_the_first() -> None:
    (row,), _ = rows_of([Thread("t", "t", (QUESTION, ANSWER))], config(64, train_on="all"))
    assert row.loss_mask.tolist() == [False] + [True] * (len(row.ids) - 1)


def test_raw_text_ends_in_eos_and_long_text_is_cut() -> None:
    texts = [Thread(name, name, (Message("text", content),)) for name, content in (("a", "abc"), ("b", "abcdefghijkl"))]
    rows, cuts = rows_of(texts, config(8))
    assert [TEMPLATE.tokenizer.decode(row.ids) for row in rows] == ["abc<|endoftext|>", "abcdefgh"]
    assert [row.loss_mask.tolist() for row in rows] == [[False, *[True] * 3], [False, *[True] * 7]]
    assert cuts == Cuts(truncated=1, left_out=0)
    (shortest,), _ = rows_of([Thread("c", "c", (Message("text", "a"),))], config(8))
    assert shortest.loss_mask.tolist() == [False, True]
    windows, _ = rows_of([Thread(str(k), "t", texts[1].messages) for k in range(50)], config(8, overlong="window"))
    assert any(row.ids[-1] == TEMPLATE.eos_id for row in windows)


def test_prefix_stands_before_every_sequence_within_its_limit() -> None:
    options = config(24, system_prefix="Be.")
    prefix, _ = TEMPLATE.encode([Message("system", "Be.")], open_assistant=False)
    assert TEMPLATE.tokenizer.decode(prefix) == "<|system|>Be.<|endoftext|>"
    own = Thread("own", "own", (Message("system", "Hm."), QUESTION, ANSWER))
    (cut, whole), _ = rows_of([LONG, own], config(40, system_prefix="Be."))
    assert cut.ids.tolist() == prefix + IDS[:35]
    assert cut.loss_mask.tolist() == [False] * 5 + MASK[:35]
    assert TEMPLATE.tokenizer.decode(whole.ids).startswith("<|system|>Be.<|endoftext|><|system|>Hm.<|endoftext|><|prompter|>")
    assert not whole.loss_mask[:16].any() and whole.loss_mask[17:].all()
    (everything,), _ = rows_of([LONG], config(24, system_prefix="Be.", train_on="all"))
    assert everything.loss_mask.tolist() == [False] * 6 + [True] * 18
    prompt, _ = TEMPLATE.encode(LONG.messages[:3], open_assistant=True)
    (row,) = encode_groups([RankedGroup("g", "g", LONG.messages[:3], ("Yes.", "No."))], TEMPLATE, options, 1, Cuts())
    assert row.sequences[0].tolist() == [*prefix, *prompt[-14:], *TEMPLATE.encode_text("Yes."), TEMPLATE.eos_id]
    assert [len(sequence) for sequence in row.sequences] == [24, 24]
    cuts = Cuts()
    (item,) = encode_prompts([PromptItem("p", "p", LONG.messages[:3])], TEMPLATE, options, cuts)
    assert item.ids.tolist() == prefix + prompt[-19:]
    assert cuts.truncated == 1


def test_prefix_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.system_prefix leaves fewer than 4 of data\.max_prompt_length = 8 tokens"):
        check_system_options(TEMPLATE, DataConfig(max_prompt_length=8, system_prefix="Be kind."))


def test_groups_that_the_cut_makes_the_same_are_left_out() -> None:
    alike = RankedGroup("a", "a", (QUESTION,), ("x" * 30 + "y", "x" * 30 + "z"))
    longer = RankedGroup("b", "b", (QUESTION,), ("x" * 30, "No."))
    short = RankedGroup("c", "c", (QUESTION,), ("Yes.", "No."))
    cuts = Cuts()
    rows = list(encode_groups([alike, longer, short], TEMPLATE, config(24), 1, cuts))
    assert [row.id for row in rows] == ["b", "c"]
    assert cuts == Cuts(truncated=1, left_out=1)
    assert all(sequence[-1] == TEMPLATE.eos_id for row in rows for sequence in row.sequences)
    assert all(sequence.dtype == np.int32 for row in rows for sequence in row.sequences)


def test_reference_answers_are_encoded_when_asked_for_and_fit_behind_their_prompt() -> None:
    items = [PromptItem("a", "a", (QUESTION,), reference="Yes."), PromptItem("b", "b", (QUESTION,))]
    assert [prompt.reference for prompt in encode_prompts(items, TEMPLATE, DataConfig(), Cuts())] == [None, None]
    with_answer, without = encode_prompts(items, TEMPLATE, DataConfig(), Cuts(), references=True)
    assert without.reference is None
    assert with_answer.reference is not None and with_answer.reference.tolist() == [*TEMPLATE.encode_text("Yes."), TEMPLATE.eos_id]
    limit = len(with_answer.ids) + 3
    (cut, _) = encode_prompts(items, TEMPLATE, DataConfig(max_length=limit), Cuts(), references=True)
    assert cut.reference is not None and cut.reference.tolist() == [*TEMPLATE.encode_text("Yes.")[:2], TEMPLATE.eos_id]
