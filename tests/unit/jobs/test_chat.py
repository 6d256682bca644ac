"""`corral chat`: turns, streaming, and what happens when the context is full."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from transformers import GenerationConfig

from app.errors import ModelError
from app.models.chat import Chat
from jobs.main import main
from tests.tiny_models import CONTEXT, make_llama, make_reward_model


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(make_llama(tmp_path / "model"))


def chat(folder: str, **options: object) -> Chat:
    return Chat(folder, temperature=0.0, max_new_tokens=8, **options)  # type: ignore[arg-type]


def test_every_turn_is_part_of_the_next_prompt(folder: str) -> None:
    pieces: list[str] = []
    talk = chat(folder, system="Be brief.")
    first = talk.reply("Hello", pieces.append)
    assert "".join(pieces).strip() == first
    talk.reply("Again", pieces.append)
    assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 2
    fresh = chat(folder, system="Be brief.")
    assert fresh.reply("Hello", pieces.append) == first
    talk.forget()
    assert talk.reply("Hello", pieces.append) == first


def test_the_oldest_exchange_makes_room(folder: str) -> None:
    talk = chat(folder)
    for _ in range(4):
        talk.reply("x" * 40, lambda piece: None)
    assert len(talk.turns) < 8
    kept = list(talk.turns)
    with pytest.raises(ModelError, match=f"do not fit the model's {CONTEXT}"):
        talk.reply("x" * CONTEXT, lambda piece: None)
    assert talk.turns == kept, "what does not fit is forgotten, the conversation is not"


def test_command_reads_lines_until_the_input_ends(folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n/new\nHello\n"))
    assert main(["chat", folder, "--temperature=0", "--max-new-tokens=6"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first
    assert first == second


def test_what_cannot_be_answered_is_no_answer(folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that reads the answers must not take the reason for one; the line stays empty, and the exit code tells."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello\n{'x' * CONTEXT}\nHello\n"))
    assert main(["chat", folder, "--temperature=0", "--max-new-tokens=6"]) == 1
    told = capsys.readouterr()
    assert told.out.splitlines()[0] and told.out.splitlines()[1] == "" and len(told.out.splitlines()) == 3
    assert told.err.count("\n") == 1 and f"do not fit the model's {CONTEXT}" in told.err


@pytest.mark.parametrize("errors", ["surrogateescape", "strict"])  # Python's choice in the locale C, and in others
def test_bytes_that_are_no_text_are_replaced(
    errors: str, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe?\n"), "utf-8", errors=errors))
    assert main(["chat", folder, "--temperature=0", "--max-new-tokens=6"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("options", [[f"--max-new-tokens={CONTEXT}"], ["--temperature=1e-45"]])
def test_options_under_which_nothing_could_be_answered(folder: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", folder, *options]) == 2
    assert options[0].partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "nowhere", f"--seed={seed}"]) == 2
    assert "--seed" in capsys.readouterr().err


def test_the_folders_own_sampling_does_not_count(folder: str) -> None:
    """PPO samples from the whole distribution, whatever generation_config.json says."""
    answer = chat(folder).reply("Hello", lambda piece: None)
    GenerationConfig(do_sample=True, top_p=0.1, repetition_penalty=50.0, min_new_tokens=8, eos_token_id=1).save_pretrained(folder)
    assert chat(folder).reply("Hello", lambda piece: None) == answer


def test_a_reward_model_writes_no_answers(folder: str, tmp_path: Path) -> None:
    """Loaded as a language model it would have an output head drawn at random."""
    with pytest.raises(ModelError, match="a reward model or an encoder writes no answers"):
        Chat(make_reward_model(tmp_path / "rm", folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "no such folder"),
        ([".", "--temperature=-1"], "--temperature must be"),
        ([".", "--temperature=nan"], "--temperature must be"),
        ([".", "--temperature=inf"], "--temperature must be"),
        ([".", "--data.path=x"], "no option --data.path=x"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *arguments]) == 2
    assert message in capsys.readouterr().err
