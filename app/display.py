"""What a person sees while a run works: a live table on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

PLAIN_SECONDS = 5.0
"""Shortest time between two plain lines of one stage, its first and last excepted."""


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is. `headline`: name and latest value of its loss or reward; `left`: estimated seconds, None while unknown."""

    stage: str
    step: int
    total: int
    seconds: float
    left: float | None = None
    headline: tuple[str, float] | None = None
    tokens_per_second: float | None = None


class Display(Protocol):
    """Where a tracker shows progress. Calls come one at a time."""

    def begin(self, progress: StageProgress) -> None: ...

    def update(self, progress: StageProgress) -> None: ...

    def end(self, progress: StageProgress) -> None: ...

    def note(self, text: str) -> None:
        """Show one line beside the progress."""
        ...

    def close(self) -> None: ...


def open_display(stream: TextIO | None = None) -> Display:
    """A live display where `stream` (default: stderr) is a terminal that can move its cursor, else plain lines."""
    stream = stream or sys.stderr
    console = Console(file=stream)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console)
    return PlainDisplay(stream)


def duration(seconds: float) -> str:
    """`9s`, `4m 05s`, `2h 03m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def measurements(progress: StageProgress) -> list[str]:
    """Loss or reward, then speed, as far as they are known."""
    parts = []
    if progress.headline is not None:
        name, value = progress.headline
        parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    return parts


class PlainDisplay:
    """One line per stage at most every `every` seconds; the first and the last one always. `dated`: each begins with date and time."""

    def __init__(self, stream: TextIO, every: float = PLAIN_SECONDS, *, dated: bool = False) -> None:
        self._stream = stream
        self._every = every
        self._dated = dated
        self._printed: dict[str, float] = {}

    def begin(self, progress: StageProgress) -> None:
        self._print(progress, "started")

    def update(self, progress: StageProgress) -> None:
        last = self._printed.get(progress.stage)
        if last is None or time.monotonic() - last >= self._every:
            self._printed[progress.stage] = time.monotonic()
            self._print(progress, "" if progress.left is None else f"{duration(progress.left)} left")

    def end(self, progress: StageProgress) -> None:
        self._printed.pop(progress.stage, None)
        self._print(progress, f"done in {duration(progress.seconds)}")

    def note(self, text: str) -> None:
        self._line(text)

    def close(self) -> None:
        self._stream.flush()

    def _print(self, progress: StageProgress, state: str) -> None:
        self._line(
            "  ".join(part for part in (f"{progress.stage}  {progress.step}/{progress.total}", *measurements(progress), state) if part)
        )

    def _line(self, text: str) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S  ") if self._dated else ""
        self._stream.write(f"{when}{text}\n")
        self._stream.flush()


class BothDisplays:
    """Shows everything twice."""

    def __init__(self, first: Display, second: Display) -> None:
        self._displays = (first, second)

    def begin(self, progress: StageProgress) -> None:
        for display in self._displays:
            display.begin(progress)

    def update(self, progress: StageProgress) -> None:
        for display in self._displays:
            display.update(progress)

    def end(self, progress: StageProgress) -> None:
        for display in self._displays:
            display.end(progress)

    def note(self, text: str) -> None:
        for display in self._displays:
            display.note(text)

    def close(self) -> None:
        for display in self._displays:
            display.close()


class RemainingColumn(ProgressColumn):
    """The tracker's own estimate of the time left; the time taken once the stage is over."""

    def render(self, task: Task) -> Text:
        progress: StageProgress = task.fields["progress"]
        if task.fields["over"]:
            return Text(f"done in {duration(progress.seconds)}", style="green")
        return Text("" if progress.left is None else f"{duration(progress.left)} left", style="cyan")


class LiveDisplay:
    """One row per stage; finished stages stay above the running one. Redrawn twice a second, which costs next to nothing."""

    def __init__(self, console: Console) -> None:
        self._rows: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            RemainingColumn(),
            console=console,
            refresh_per_second=2,
            redirect_stdout=sys.stdout.isatty(),  # a redirected stdout is somebody's file and must not end up on the terminal
        )
        self._progress.start()

    def begin(self, progress: StageProgress) -> None:
        if progress.stage in self._rows:
            self._progress.remove_task(self._rows[progress.stage])
        self._rows[progress.stage] = self._progress.add_task(
            escape(progress.stage), total=progress.total, completed=progress.step, numbers="", progress=progress, over=False
        )

    def update(self, progress: StageProgress) -> None:
        self._show(progress, over=False)

    def end(self, progress: StageProgress) -> None:
        self._show(progress, over=True)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()

    def _show(self, progress: StageProgress, *, over: bool) -> None:
        numbers = escape("  ".join(measurements(progress)))
        self._progress.update(self._rows[progress.stage], completed=progress.step, numbers=numbers, progress=progress, over=over)
