"""Metrics on disk, in TensorBoard and on the display."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from app import tracking
from app.display import LiveDisplay, PlainDisplay, StageProgress, duration, open_display
from app.errors import DiskError
from app.tracking import RunTracker


def lines(run: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path, stage: str, tag: str) -> list[tuple[int, float]]:
    """What a reader of TensorBoard's files has of a metric."""
    events = EventAccumulator(str(run / "tensorboard" / stage)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_metrics_reach_the_file_and_tensorboard(tmp_path: Path) -> None:
    with RunTracker(tmp_path, display=PlainDisplay(io.StringIO())) as tracker:
        tracker.log("sft", 1, {"loss": 2.5, "tokens_per_second": 100})
        tracker.log("sft", 2, {"loss": 2.25})
        assert lines(tmp_path)[0]["metrics"] == {"loss": 2.5, "tokens_per_second": 100.0}, "written at once, not at the end"
    assert [(line["stage"], line["step"]) for line in lines(tmp_path)] == [("sft", 1), ("sft", 2)]
    assert curve(tmp_path, "sft", "sft/loss") == [(1, 2.5), (2, 2.25)]


def test_events_are_lines_of_their_own_and_shown(tmp_path: Path) -> None:
    stream = io.StringIO()
    for step in (3, 4):
        with RunTracker(tmp_path, display=PlainDisplay(stream)) as tracker:
            tracker.event("ppo", step, "alarm: kl = 12")
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write('{"cut by a kill')
    with RunTracker(tmp_path, display=PlainDisplay(stream)):
        events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["stage"], event["step"], event["text"]) for event in events] == [
        ("ppo", 3, "alarm: kl = 12"),
        ("ppo", 4, "alarm: kl = 12"),
    ]
    assert "ppo: step 3: alarm: kl = 12" in stream.getvalue()


def test_a_second_session_appends_after_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    for session in (1, 2):
        with RunTracker(tmp_path, display=PlainDisplay(io.StringIO())) as tracker:
            tracker.log("ppo", session, {"score_mean": 0.5})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"time": 17, "stage": "pp')
    with RunTracker(tmp_path, display=PlainDisplay(io.StringIO())):
        pass
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert curve(tmp_path, "ppo", "ppo/score_mean") == [(1, 0.5), (2, 0.5)]


def test_tensorboard_has_steps_that_are_done_again_once_and_those_of_other_stages_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of one second are read by the number that their process gave them, of which the tenth comes before the ninth.
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(0))

    def session(value: float, *beginnings: tuple[int, int]) -> None:
        """Begins PPO, as often as it loses its learner, behind `done` steps and logs those up to `last`."""
        with RunTracker(tmp_path, display=PlainDisplay(io.StringIO())) as tracker:
            for done, last in beginnings:
                tracker.begin("ppo", 9, done=done)
                for step in range(done + 1, last + 1):
                    tracker.log("ppo", step, {"kl": value})

    with RunTracker(tmp_path, display=PlainDisplay(io.StringIO())) as tracker:
        tracker.begin("sft", 3)
        for step in (1, 2, 3):
            tracker.log("sft", step, {"loss": 1.0})
    session(1.0, (0, 2))
    session(2.0, (0, 6), (4, 5))
    session(3.0, (4, 5))
    session(4.0, (4, 9))
    assert curve(tmp_path, "ppo", "ppo/kl") == [(step, 2.0) for step in range(1, 5)] + [(step, 4.0) for step in range(5, 10)]
    assert curve(tmp_path, "sft", "sft/loss") == [(step, 1.0) for step in (1, 2, 3)]


def test_numbers_that_are_not_finite_are_null_and_announced_once(tmp_path: Path) -> None:
    out = io.StringIO()
    with RunTracker(tmp_path, display=PlainDisplay(out)) as tracker:
        tracker.begin("rm", 3)
        for step in (1, 2, 3):
            tracker.log("rm", step, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-5})
        tracker.end("rm")
    first = lines(tmp_path)[0]
    assert first["metrics"] == {"loss": None, "grad_norm": None, "lr": 1e-5}
    assert first["non_finite"] == {"loss": "nan", "grad_norm": "inf"}
    assert out.getvalue().count("rm: loss is nan at step 1") == 1
    assert "at step 2" not in out.getvalue()
    assert "loss nan" in out.getvalue().splitlines()[-1]


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    with RunTracker(tmp_path, display=PlainDisplay(io.StringIO())) as tracker:
        tracker.begin("sft", 100)

        def work(thread: int) -> None:
            for step in range(50):
                tracker.log("sft", step, {f"metric_{thread}": step, "loss": 1.0})
                tracker.note(f"thread {thread}")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tracker.end("sft")
    assert len(lines(tmp_path)) == 200


def test_plain_lines_are_few_with_the_first_and_the_last(tmp_path: Path) -> None:
    out = io.StringIO()
    with RunTracker(tmp_path, display=PlainDisplay(out, every=60)) as tracker:
        tracker.begin("ppo", 500)
        for step in range(1, 501):
            tracker.log("ppo", step, {"score_mean": step / 1000, "tokens_per_second": 1234.5})
        tracker.end("ppo")
        tracker.note("report: runs/demo/report.html")
    assert out.getvalue().splitlines() == [
        "ppo  0/500  started",
        "ppo  1/500  score mean 0.001  1,234 tokens/s",
        "ppo  500/500  score mean 0.5  1,234 tokens/s  done in 0s",
        "report: runs/demo/report.html",
    ]


def test_time_left_follows_the_pace_since_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    seen: list[StageProgress] = []

    class Recorder(PlainDisplay):
        def update(self, progress: StageProgress) -> None:
            seen.append(progress)

    with RunTracker(tmp_path, display=Recorder(io.StringIO())) as tracker:
        tracker.begin("sft", total_steps=100, done=40)
        clock[0] += 30  # start-up, which says nothing about the pace
        tracker.log("sft", 41, {"loss": 2.0})
        clock[0] += 6
        tracker.log("sft", 44, {"eval_loss": 3.0})
        tracker.end("sft")
    assert seen[0].left is None
    assert seen[1].left == pytest.approx(2 * 56)
    assert seen[1].headline == ("loss", 2.0), "an evaluation point does not take the loss from the display"


def test_a_stage_that_was_not_begun_is_recorded_but_not_shown(tmp_path: Path) -> None:
    out = io.StringIO()
    with RunTracker(tmp_path, display=PlainDisplay(out)) as tracker:
        tracker.log("evaluation", 0, {"gold": 0.4})
    assert out.getvalue() == ""
    assert len(lines(tmp_path)) == 1


def test_live_display_shows_stage_steps_loss_speed_and_time_left() -> None:
    out = io.StringIO()
    display = LiveDisplay(Console(file=out, force_terminal=True, width=120, color_system=None))
    start = StageProgress("sft", 0, 120, 0.0)
    display.begin(start)
    display.update(StageProgress("sft", 30, 120, 10.0, 65.0, ("loss", 1.25), 5120.0))
    display.note("[3] is no markup")
    display._progress.refresh()
    display.end(StageProgress("sft", 120, 120, 75.0, 0.0, ("loss", 1.0), 5120.0))
    display.close()
    shown = out.getvalue()
    for text in ("sft", "30/120", "loss 1.25", "5,120 tokens/s", "1m 05s left", "[3] is no markup", "✓", "done in 1m 15s"):
        assert text in shown


def test_a_stream_that_is_no_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    assert isinstance(open_display(io.StringIO()), PlainDisplay)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_display(Terminal()), PlainDisplay)
    monkeypatch.setenv("TERM", "xterm-256color")
    display = open_display(Terminal())
    display.close()
    assert isinstance(display, LiveDisplay)


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0s"), (59.6, "1m 00s"), (245, "4m 05s"), (7380, "2h 03m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_importing_the_tracker_loads_neither_torch_nor_ray() -> None:
    code = "import sys, app.tracking; sys.exit(bool({'torch', 'ray', 'tensorflow', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@contextmanager
def no_room() -> Iterator[None]:
    """No file of this process may grow: what a full disk is to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread meets it too
@pytest.mark.parametrize(
    "record",
    [
        lambda tracker: tracker.log("ppo", 2, {"kl": 0.1}),
        lambda tracker: tracker.event("ppo", 2, "alarm"),
        lambda tracker: tracker.note("going on"),
        lambda tracker: tracker.begin("ppo", 3),
    ],
)
def test_a_full_disk_is_told_in_one_line_which_the_end_of_the_session_does_not_hide(
    tmp_path: Path, record: Callable[[RunTracker], None]
) -> None:
    tracker = RunTracker(tmp_path, display=PlainDisplay(io.StringIO()))
    tracker.log("ppo", 1, {"kl": 0.1})
    tracker.note("step 1")
    tracker.event("ppo", 1, "alarm")
    expected = rf"^{tmp_path}: what the run records cannot be written \(File too large\): free space there, or make it writable; [^\n]*$"
    with no_room(), pytest.raises(DiskError, match=expected), tracker:
        record(tracker)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_the_end_of_a_session_on_a_full_disk_does_not_hide_why_it_ended(tmp_path: Path) -> None:
    tracker = RunTracker(tmp_path, display=PlainDisplay(io.StringIO()))
    tracker.note("step 1")
    with no_room(), pytest.raises(DiskError, match="the checkpoint of step 3"), tracker:
        raise DiskError("the checkpoint of step 3 cannot be written")
