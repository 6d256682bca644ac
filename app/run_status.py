"""What state a run is in, from the files of its folder, wherever that is."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.errors import CheckpointError, first_line
from app.process_record import runs_here
from app.run_layout import MANIFEST, METRICS_FILE, PROGRESS_FILE
from app.storage.place import Place

TAIL_BYTES = 2**16
"""Of metrics.jsonl, which grows to many MiB; a line has a few KiB."""
PATIENCE_SECONDS = 1800.0
"""How long a run on another host may be silent, where its recipe does not say."""


@dataclass(frozen=True)
class RunStatus:
    """state: `running`, `finished`, `interrupted` (stopped on request), `failed`, `killed` (ended without a word), `unknown` (on a host
    that this one cannot look at, and silent for longer than any wait of the run) or `unreadable`, of which only the reason is known;
    started, active: when the last session began and when something last happened, unix seconds; step of steps: of the stage that began
    last; alive: whether its process is there, None where that cannot be seen from here."""

    run: str
    state: str
    command: str | None = None
    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    finished_stages: tuple[str, ...] = ()
    started: float | None = None
    active: float | None = None
    host: str | None = None
    pid: int | None = None
    alive: bool | None = None
    job: str | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def find_runs(place: Place) -> list[RunStatus]:
    """The run in a folder, or else those in the folders right under it, the one that was active last first. Raises OSError."""
    own = read_status(place)
    if own is not None:
        return [own]
    found = [_status_or_why_not(place.inside(name)) for name in place.folders()]
    return sorted((status for status in found if status is not None), key=lambda status: -(status.active or 0.0))


def _status_or_why_not(place: Place) -> RunStatus | None:
    """One spoilt folder does not hide the runs beside it."""
    try:
        return read_status(place)
    except CheckpointError as error:
        return RunStatus(place.url, "unreadable", reason=str(error))


def read_status(place: Place) -> RunStatus | None:
    """The state of the run in a folder; None where there is none. Raises OSError, and CheckpointError for files that are none of a run."""
    manifest = _read_json(place, MANIFEST)
    if manifest is None or "sessions" not in manifest or not manifest["sessions"]:
        return None
    progress = _read_json(place, PROGRESS_FILE) or {}
    try:
        return _status(place, manifest, progress)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{place.url}: {MANIFEST} or {PROGRESS_FILE} is none of a run ({type(error).__name__}: {first_line(error)}): "
            "restore it, or remove that folder"
        ) from error


def _status(place: Place, manifest: Mapping[str, Any], progress: Mapping[str, Any]) -> RunStatus:
    session = manifest["sessions"][-1]
    last = last_points((place.read(METRICS_FILE, -TAIL_BYTES) or b"").decode("utf-8", "replace"))
    stage = progress.get("stage")
    active = max([session["started"], session.get("ended", 0.0), *(point["time"] for point in last.values())])
    patience = float(manifest.get("config", {}).get("run", {}).get("deadline_seconds", PATIENCE_SECONDS))
    return RunStatus(
        run=place.url,
        state=session_state(session, silent=time.time() - active, patience=patience),
        command=session["command"],
        stage=stage,
        step=max(int(progress.get("done", 0)), int(last.get(stage, {}).get("step", 0))) if stage else None,
        steps=progress.get("steps"),
        finished_stages=tuple(manifest.get("stages", {})),
        started=session["started"],
        active=active,
        host=session.get("host"),
        pid=session.get("pid"),
        alive=runs_here(session),
        job=session.get("job"),
        reason=session.get("reason"),
    )


def session_state(session: Mapping[str, Any], *, silent: float, patience: float) -> str:
    """The state of a run whose last session this is; `silent`: seconds since anything happened.

    >>> session_state({"outcome": "failed"}, silent=5, patience=9), session_state({"host": "elsewhere", "pid": 7}, silent=5, patience=9)
    ('failed', 'running')
    """
    if "outcome" in session:
        return str(session["outcome"])
    here = runs_here(session)
    if here is None:
        return "running" if silent < patience else "unknown"
    return "running" if here else "killed"


def last_points(lines: str) -> dict[str, dict[str, Any]]:
    """The last complete line of each stage among the last lines of metrics.jsonl."""
    points = {}
    for line in lines.splitlines():
        try:
            point = json.loads(line)
            points[str(point["stage"])] = {"time": float(point["time"]), "step": int(point["step"])}
        except (ValueError, KeyError, TypeError):  # the first line may be half read, the last one half written
            continue
    return points


def _read_json(place: Place, name: str) -> dict[str, Any] | None:
    content = place.read(name)
    value = None if content is None else place.parsed(name, content, "restore it, or remove that folder")
    return value if isinstance(value, dict) else None
