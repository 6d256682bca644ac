"""Replies as reward models read them: ours at the end token, others whatever their chat template writes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from app.config.data import DataConfig
from app.data.encoding import Cuts, encode_groups
from app.data.templates import build_template
from app.errors import BadRequestError
from app.experience import FinishReason, Prompt, Rollout
from app.formats.records import Message, RankedGroup
from app.models.heads import convert_reward_model, has_reward_offset, init_reward_model, save_reward_model
from app.models.replies import ReplyEncoder, Rewriter
from serve.texts import Texts
from tests.tiny_models import make_chatml_tokenizer, make_foreign_reward_model, make_llama, make_tokenizer

QUESTION = (Message("system", "Be kind."), Message("user", "Who?"))
TURNS: list[dict[str, str]] = [message.as_dict() for message in QUESTION]
ANSWER = "It is I.<|im_end|>\n"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_foreign_reward_model(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model of `corral rm` with ChatML's template."""
    folder = tmp_path_factory.mktemp("ours")
    save_reward_model(init_reward_model(make_llama(folder / "trunk"), seed=0), make_chatml_tokenizer(), folder / "model", 0.5)
    return str(folder / "model")


def rendered(path: str, answer: str) -> list[int]:
    """What plain transformers makes of the conversation."""
    ids = AutoTokenizer.from_pretrained(path).apply_chat_template([*TURNS, {"role": "assistant", "content": answer}], return_dict=True)
    return list(ids["input_ids"])


def test_a_model_from_elsewhere_reads_all_that_its_chat_template_writes(foreign: str) -> None:
    (encoded,) = ReplyEncoder.of(foreign).encode(QUESTION, ["It is I."])
    assert encoded.ids.tolist() == rendered(foreign, "It is I.")
    assert make_chatml_tokenizer().decode(encoded.ids).endswith("It is I.<|im_end|>\n")
    assert (encoded.reply_tokens, encoded.truncated) == (len("It is I.") + 2, False)


def test_a_model_of_ours_reads_up_to_the_end_token_as_in_training(ours: str) -> None:
    (encoded,) = ReplyEncoder.of(ours).encode(QUESTION, ["It is I."])
    assert encoded.ids.tolist() == rendered(ours, "It is I.")[:-1]
    template = build_template("auto", make_chatml_tokenizer())
    group = RankedGroup("g", "t", QUESTION, ("It is I.", "No."))
    (row,) = encode_groups([group], template, DataConfig(), 1, Cuts())
    np.testing.assert_array_equal(encoded.ids, row.sequences[0])
    assert encoded.reply_tokens == len("It is I.") + 1


def test_no_text_can_write_a_special_token(foreign: str, ours: str) -> None:
    for path in (foreign, ours):
        (encoded,) = ReplyEncoder.of(path).encode(QUESTION, [ANSWER])
        special = make_chatml_tokenizer().convert_tokens_to_ids("<|im_end|>")
        assert encoded.ids.tolist().count(special) == 3  # of system, user and answer
        assert encoded.reply_tokens == len(ANSWER) + (2 if path == foreign else 1)


@pytest.mark.parametrize("text", ["It is I.", ""])
def test_an_unfinished_reply_has_no_end(foreign: str, ours: str, text: str) -> None:
    for path in (foreign, ours):
        encoder = ReplyEncoder.of(path)
        (whole,), (open_end,) = encoder.encode(QUESTION, [text]), encoder.encode(QUESTION, [text], finished=False)
        ending = 2 if path == foreign else 1
        assert open_end.ids.tolist() == whole.ids.tolist()[:-ending]
        assert open_end.reply_tokens == len(text)


def test_what_is_too_long_loses_the_oldest_of_the_prompt_then_the_last_of_the_reply(foreign: str) -> None:
    (whole,) = ReplyEncoder.of(foreign).encode(QUESTION, ["It is I."])
    (cut,) = ReplyEncoder.of(foreign, max_length=40).encode(QUESTION, ["It is I."])
    assert cut.truncated and cut.ids.tolist() == whole.ids.tolist()[-40:]
    (short,) = ReplyEncoder.of(foreign, max_length=12).encode(QUESTION, ["It is I."])
    assert short.ids.tolist() == [*whole.ids[:-10][-3:], *whole.ids[-10:-3], *whole.ids[-2:]]


def test_a_rollout_is_written_once_more_from_its_text(foreign: str) -> None:
    policy = build_template("auto", make_tokenizer())
    rewriter = Rewriter.of(foreign, policy.decode)
    assert rewriter.encoder.max_length == 1024  # the model's context

    def rollout(text: str, finish: FinishReason) -> Rollout:
        ids = np.array([*policy.encode_text(text), *([policy.eos_id] if finish is FinishReason.STOP else [])], np.int32)
        prompt = Prompt("p", "Who?", np.array([7], np.int32), tuple(TURNS))
        return Rollout(prompt, 0, ids, np.zeros(len(ids), np.float32), finish, np.zeros(len(ids), np.int32))

    finished, cut = rewriter(rollout("It is I.", FinishReason.STOP)), rewriter(rollout("It is", FinishReason.LENGTH))
    assert (finished.dtype, finished.tolist()) == (np.int32, rendered(foreign, "It is I."))
    assert cut.tolist() == rendered(foreign, "It is")[:-2]


def test_the_service_reads_conversations_as_the_models_do(foreign: str, ours: str) -> None:
    """Scores of texts over HTTP are those of `corral score` and of training: ours are read at the end token, not at what follows it."""
    texts = Texts(trust_remote_code=False)
    conversation: Any = [*TURNS, {"role": "assistant", "content": "It is I."}]

    def ids(path: str, turns: Any) -> list[int]:
        return asyncio.run(texts.conversations(path, [turns]))[0]

    assert ids(foreign, conversation) == rendered(foreign, "It is I.")
    assert ids(ours, conversation) == rendered(ours, "It is I.")[:-1]
    assert ids(ours, TURNS) == rendered(ours, "")[: len(ids(ours, TURNS))]
    assert len(ids(ours, conversation[-1:])) > 0
    with pytest.raises(BadRequestError, match="no chat template"):
        ids(make_llama_without_template(Path(ours).parent), conversation)


def make_llama_without_template(folder: Path) -> str:
    path = make_llama(folder / "bare")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    (Path(path) / "chat_template.jinja").unlink(missing_ok=True)
    return path


def test_a_converted_model_is_read_as_before(foreign: str, ours: str, tmp_path: Path) -> None:
    for number, path in enumerate((foreign, ours)):
        convert_reward_model(path, tmp_path / str(number))
        assert has_reward_offset(str(tmp_path / str(number))) == has_reward_offset(path) == (path == ours)
