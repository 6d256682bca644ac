"""What the scripts that run TRL beside us share, in TRL's own environment: its steps taken in turn with ours, and their seconds."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from transformers import TrainerCallback


class Turns(TrainerCallback):
    """Seconds of every optimizer step, its batch included, also as a JSON line {"step_seconds": ...} on standard output.

    wait: a step begins when a line comes in on standard input.
    """

    def __init__(self, *, wait: bool) -> None:
        self.wait, self.seconds = wait, list[float]()

    def on_train_begin(self, *arguments: Any, **more: Any) -> None:
        self._begin()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        sys.stdout.write(json.dumps({"step_seconds": self.seconds[-1]}) + "\n")
        sys.stdout.flush()
        self._begin()

    def _begin(self) -> None:
        if self.wait:
            sys.stdin.readline()
        self._began = time.perf_counter()
