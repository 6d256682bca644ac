"""What tests of several modules are given."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A slow one: commits of checkpoints wait for this event."""
    from app.durable import file_hashes

    ready = threading.Event()

    def slow_hashes(folder: Path) -> dict[str, dict[str, Any]]:
        assert ready.wait(60)
        return file_hashes(folder)

    monkeypatch.setattr("app.checkpoint.file_hashes", slow_hashes)
    yield ready
    ready.set()
