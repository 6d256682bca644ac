"""Where metrics go: `metrics.jsonl` and, in words, `events.jsonl`; TensorBoard, display, tracking services; from any driver thread."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TextIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from app.display import BothDisplays, Display, PlainDisplay, StageProgress, open_display
from app.durable import without_non_finite, write_json, writing
from app.errors import DiskError, first_line
from app.run_layout import EVENTS_FILE, LOG_FILE, METRICS_FILE, PROGRESS_FILE
from app.trackers.delivery import Delivery
from app.trackers.service import Point, TrackingService

TENSORBOARD_FOLDER = "tensorboard"
HEADLINES = ("score_mean", "reward", "loss", "eval_loss")
"""The metric that stands for a stage on the display: the first of these that the stage has logged."""
SPEED = "tokens_per_second"
LOG_SECONDS = 30.0
"""Shortest time between two lines of one stage in the log."""


@dataclass
class _Stage:
    """What the display needs to know about a running stage."""

    total: int
    step: int
    began: float
    latest: dict[str, float]
    first_log: tuple[int, float] | None = None

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step = max(self.step, step)
        self.latest.update(metrics)
        self.first_log = self.first_log or (step, time.monotonic())

    def progress(self, name: str) -> StageProgress:
        headline = next(((key, self.latest[key]) for key in HEADLINES if key in self.latest), None)
        return StageProgress(
            name, self.step, self.total, time.monotonic() - self.began, self._seconds_left(), headline, self.latest.get(SPEED)
        )

    def _seconds_left(self) -> float | None:
        """From the pace since the first logged step: what comes before that step is start-up and would distort it."""
        if self.first_log is None or self.step <= self.first_log[0]:
            return None
        pace = (time.monotonic() - self.first_log[1]) / (self.step - self.first_log[0])
        return pace * max(0, self.total - self.step)


def recording(run_path: Path) -> AbstractContextManager[None]:
    """Within this block a disk that is full, read-only or gone is a DiskError."""
    return writing(f"{run_path}: what the run records", "make it writable; the same command goes on from the last checkpoint")


class _Curves:
    """TensorBoard's files, a folder for each stage. What begins a session in one says from which step on the older values there are gone;
    steps of other stages have nothing to do with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, EventFileWriter] = {}

    def start(self, stage: str, step: int) -> None:
        """From here on values of `step` and later ones replace those that are there."""
        self._file(stage).add_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, stage: str, step: int, now: float, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=f"{stage}/{name}", simple_value=value) for name, value in values.items()]
        self._file(stage).add_event(Event(wall_time=now, step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        with ExitStack() as closing:
            for file in self._files.values():
                closing.callback(file.close)

    def _file(self, stage: str) -> EventFileWriter:
        if stage not in self._files:
            self._files[stage] = EventFileWriter(str(self._folder / stage))
        return self._files[stage]


class _Log(PlainDisplay):
    """In the run's folder; the disk there may be full."""

    def __init__(self, run_path: Path, stream: TextIO) -> None:
        super().__init__(stream, LOG_SECONDS, dated=True)
        self._run_path = run_path

    def _line(self, text: str) -> None:
        with recording(self._run_path):
            super()._line(text)

    def close(self) -> None:
        with recording(self._run_path):
            super().close()


class RunTracker:
    """The Tracker of a run; a context manager. Opened again on the same folder, it appends.

    A line of metrics.jsonl is `{"time": unix seconds, "stage": ..., "step": ..., "metrics": {...}}`; a metric that is not finite is
    null there, named with its value under `non_finite`, and announced on the display.
    services: name -> where every metric goes too; they are closed with the tracker. Methods raise DiskError.
    """

    def __init__(
        self, run_path: Path, *, display: Display | None = None, services: Mapping[str, TrackingService] = MappingProxyType({})
    ) -> None:
        run_path.mkdir(parents=True, exist_ok=True)
        self._path = run_path
        self._lock = threading.RLock()
        self._stages: dict[str, _Stage] = {}
        self._announced: set[tuple[str, str]] = set()
        self._events_path = run_path / EVENTS_FILE
        for file in (METRICS_FILE, EVENTS_FILE):
            drop_partial_line(run_path / file)
        self._file = (run_path / METRICS_FILE).open("a", encoding="utf-8")
        self._curves = _Curves(run_path / TENSORBOARD_FOLDER)
        self._log = (run_path / LOG_FILE).open("a", encoding="utf-8")
        self._display: Display = BothDisplays(display or open_display(), _Log(run_path, self._log))
        self._progress_path = run_path / PROGRESS_FILE
        self._deliveries = [Delivery(name, service, self.note) for name, service in services.items()]
        for name, service in services.items():
            self._display.note(f"{name}: {service.address}")

    def begin(self, stage: str, total_steps: int, done: int | None = None) -> None:
        """Show a stage of `total_steps` steps, of which an earlier session did the first `done`; what was logged of later ones counts no
        more. None: that is not known yet."""
        with self._lock:
            self._stages[stage] = _Stage(total_steps, done or 0, time.monotonic(), {})
            self._display.begin(self._stages[stage].progress(stage))
            with recording(self._path):
                write_json(self._progress_path, {"stage": stage, "steps": total_steps, "done": done or 0})
                if done is not None:
                    self._curves.start(stage, done + 1 if done else 0)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record scalars of one step. A stage that was not begun is recorded without being shown."""
        values = {name: float(value) for name, value in metrics.items()}
        with self._lock:
            self._write(stage, step, values)
            running = self._stages.get(stage)
            if running is not None:
                running.advance(step, values)
                self._display.update(running.progress(stage))

    def event(self, stage: str, step: int, text: str) -> None:
        """Append `{"time", "stage", "step", "text"}` to events.jsonl, and show the text."""
        line = json.dumps({"time": round(time.time(), 3), "stage": stage, "step": step, "text": text}, ensure_ascii=False)
        with self._lock, recording(self._path), self._events_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.note(f"{stage}: step {step}: {text}")

    def note(self, text: str) -> None:
        """Show one line."""
        with self._lock:
            self._display.note(text)

    def end(self, stage: str) -> None:
        """The stage is over."""
        with self._lock:
            self._display.end(self._stages.pop(stage).progress(stage))

    def _write(self, stage: str, step: int, values: dict[str, float]) -> None:
        now = time.time()
        strange = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        line = {"time": round(now, 3), "stage": stage, "step": step, "metrics": without_non_finite(values)}
        if strange:
            line["non_finite"] = strange
        with recording(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            self._curves.add(stage, step, now, values)
        for delivery in self._deliveries:
            delivery.log(Point(stage, step, now, values))
        for name in strange:
            if (stage, name) not in self._announced:
                self._announced.add((stage, name))
                self._display.note(f"{stage}: {name} is {strange[name]} at step {step}")

    def __enter__(self) -> RunTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with nullcontext() if error is None else suppress(OSError, DiskError):  # what has ended the session is told, not this
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        try:
            for delivery in self._deliveries:  # without the lock: they may still have something to note
                delivery.close(failed=error is not None)
        finally:
            with self._lock, ExitStack() as closing:  # all of it, whatever happens to some; the last one first
                closing.callback(self._close_files)
                closing.callback(self._display.close)
                if error is not None:
                    PlainDisplay(self._log, dated=True).note(f"{type(error).__name__}: {first_line(error)}")

    def _close_files(self) -> None:
        with recording(self._path), ExitStack() as closing:
            for file in (self._curves, self._file, self._log):
                closing.callback(file.close)


def drop_partial_line(path: Path) -> None:
    """Cut what a killed process left of a line at the end of `path`, so that the next line starts on its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        with path.open("r+b") as file:
            file.truncate(complete)
