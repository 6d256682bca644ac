"""What the README shows can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from jobs.main import build_parser, main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^corral [^\n#]+", README, re.MULTILINE)
TARGETS = re.findall(r"\bmake (\w+)", README)


def test_short_enough_to_read() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    if words[0] == "doctor":
        assert (ROOT / words[1]).is_file()
        return
    if words[0] in ("chat", "data", "export", "plan", "replay", "runs", "score"):
        parsed, keys = build_parser(words).parse_known_args(words)
        assert parsed.command == words[0]
        assert [key for key in keys if not key.startswith("--model.path=")] == []
        return
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out


def test_make_targets_exist() -> None:
    assert COMMANDS
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in TARGETS if f"\n{target}: " not in makefile] == []


def test_named_files_exist() -> None:
    paths = re.findall(r"`((?:app|serve|jobs|requirements|bench|tests)/[\w./-]+)`", README)
    assert [path for path in paths if not (ROOT / path).exists()] == []
