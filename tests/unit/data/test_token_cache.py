"""Token rows: truncation, and parquet files that give back what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.data import DataConfig
from app.data.encoding import Cuts, encode_groups, encode_prompts, encode_threads, join_reply
from app.data.templates import Message, Template, build_template
from app.data.token_cache import (
    read_groups,
    read_threads,
    write_groups,
    write_threads,
)
from app.errors import DataError
from app.formats.records import PromptItem, RankedGroup, Thread
from app.models.embedded import train_tokenizer

QUESTION, ANSWER = Message("user", "What is it?"), Message("assistant", "It is a horse.")


@pytest.fixture(scope="module")
def template() -> Template:
    return build_template("oasst", train_tokenizer([QUESTION.content, ANSWER.content] * 4))


def test_threads(template: Template, tmp_path: Path) -> None:
    thread = Thread("t", "t", (QUESTION, ANSWER), "chats")
    (row,) = encode_threads([thread], template, DataConfig(), 1, Cuts())
    ids, mask = template.encode(thread.messages, open_assistant=False)
    assert (row.ids.tolist(), row.loss_mask.tolist()) == (ids, mask)
    (cut,) = encode_threads([thread], template, DataConfig(max_length=len(ids) - 1), 1, Cuts())
    assert cut.ids.tolist() == ids[:-1]
    assert write_threads([row, cut], tmp_path / "sft.arrow") == 2
    back = read_threads(tmp_path / "sft.arrow")
    assert back.datasets == [back[0].dataset, back[1].dataset] == ["chats", "chats"]
    for before, after in zip([row, cut], back, strict=True):
        assert after.ids.dtype == np.int32
        assert after.loss_mask.dtype == np.bool_
        np.testing.assert_array_equal(before.ids, after.ids)
        np.testing.assert_array_equal(before.loss_mask, after.loss_mask)


def test_groups(template: Template, tmp_path: Path) -> None:
    group = RankedGroup("g", "t", (QUESTION,), (ANSWER.content, "No idea."))
    (row,) = encode_groups([group], template, DataConfig(), 1, Cuts())
    assert row.sequences[0].tolist() == template.encode((QUESTION, ANSWER), open_assistant=False)[0]
    write_groups([row, row], tmp_path / "rm.arrow")
    back = read_groups(tmp_path / "rm.arrow")
    assert [after.id for after in back] == ["g", "g"]
    for after in back:
        for before_ids, after_ids in zip(row.sequences, after.sequences, strict=True):
            assert after_ids.dtype == np.int32
            np.testing.assert_array_equal(before_ids, after_ids)


def test_prompts(template: Template) -> None:
    item = PromptItem("p", "t", (QUESTION, ANSWER, QUESTION))
    (prompt,) = encode_prompts([item], template, DataConfig(), Cuts())
    ids, _ = template.encode(item.messages, open_assistant=True)
    assert prompt.ids.tolist() == ids
    (cut,) = encode_prompts([item], template, DataConfig(max_prompt_length=5), Cuts())
    assert cut.ids.tolist() == ids[-5:]
    assert (prompt.id, prompt.text, prompt.messages[0]) == ("p", QUESTION.content, {"role": "user", "content": QUESTION.content})


@given(prompt=st.integers(1, 60), reply=st.integers(0, 60), max_length=st.integers(8, 64))
def test_join_reply(prompt: int, reply: int, max_length: int) -> None:
    """Never too long, always ends in eos; the prompt keeps its newest tokens, the reply its first ones, and nothing is cut without need."""
    prompt_ids, reply_ids, eos = list(range(100, 100 + prompt)), list(range(200, 200 + reply)), 0
    out = join_reply(prompt_ids, reply_ids, [eos], max_length).tolist()
    assert len(out) == min(prompt + reply + 1, max_length)
    assert out[-1] == eos
    from_prompt = [token for token in out[:-1] if token < 200]
    from_reply = [token for token in out[:-1] if token >= 200]
    assert from_prompt == prompt_ids[prompt - len(from_prompt) :]
    assert from_reply == reply_ids[: len(from_reply)]
    assert len(from_prompt) >= min(prompt, max_length // 4)


def test_damaged_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.arrow").write_text("no table")
    for file in ("bad.arrow", "missing.arrow"):
        with pytest.raises(DataError, match=file):
            read_threads(tmp_path / file)
