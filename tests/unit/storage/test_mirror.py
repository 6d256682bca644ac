"""A run goes on from a URL: whatever moment one side dies at, only what is whole counts on the other."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from app.checkpoint import CheckpointStore, read_checkpoint
from app.config.recipe import Recipe
from app.durable import tree_hash
from app.errors import CheckpointError, StorageError
from app.run_folder import RunFolder
from app.storage import filling
from app.storage import mirror as module
from app.storage.filling import INDEX, read_index
from app.storage.lease import NAME, Lease
from app.storage.mirror import Mirror
from app.storage.place import Place, open_place
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr("app.run_folder.code_version", lambda: "now")
    numbers = itertools.count(1)
    monkeypatch.setattr("app.run_folder.time.time", lambda: float(next(numbers)))  # sessions are told apart by when they began


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/kept" if request.param == "file" else f"memory://{uuid.uuid4().hex}/kept"


class Session:
    """One start of a run in a local folder, kept at a URL."""

    def __init__(self, url: str, path: Path, place: Place | None = None, **sections: Any) -> None:
        self.mirror = Mirror(place or open_place(url), None)
        recipe = Recipe.model_validate({"run": {"dir": str(path), "storage": url}, **sections})
        self.run = RunFolder.open(recipe, "sft", fill=self.mirror.fill)
        self.path = self.run.path
        self.store = CheckpointStore(self.path / "sft" / "checkpoints")
        self.mirror._path = self.path

    def save(self, step: int) -> Path:
        def write(folder: Path) -> None:
            (folder / "weights").write_bytes(bytes([step]) * 1000)

        self.run.stage("sft")
        return self.store.save(step, {"step": step}, write)

    def finish(self) -> None:
        model = self.run.stage("sft") / "model"
        model.mkdir()
        (model / "model.safetensors").write_text("trained")
        self.run.finish("sft", {"loss": 1.0}, {})


def elsewhere(session: Session) -> Path:
    return session.path.with_name(f"{session.path.name}-moved")


def test_a_run_goes_on_in_another_folder_with_the_same_bytes(url: str, tmp_path: Path) -> None:
    first = Session(url, tmp_path / "run")
    first.run.record_data("0" * 64)
    for step in (1, 2, 3):
        first.save(step)
        (first.path / "metrics.jsonl").write_text("line\n" * step)
        first.mirror.push()
    there = set(first.mirror.place.files())
    assert there == {
        "manifest.json",
        "metrics.jsonl",
        *(f"sft/checkpoints/step-0000000{n}/{f}" for n in (2, 3) for f in ("manifest.json", "weights")),
    }
    second = Session(url, elsewhere(first))
    saved = second.store.latest()
    assert saved is not None
    assert (saved.step, saved.state) == (3, {"step": 3})
    assert tree_hash(saved.path) == tree_hash(first.path / "sft" / "checkpoints" / "step-00000003")
    assert not (second.path / "sft" / "checkpoints" / "step-00000002").exists(), "only the newest one is needed"
    assert (second.path / "metrics.jsonl").read_text() == "line\n" * 3
    second.save(4)
    second.finish()
    second.mirror.push()
    assert second.mirror.place.inside("sft/checkpoints").folders() == ["step-00000003", "step-00000004"]
    third = Session(url, elsewhere(second))
    assert third.run.finished("sft") == {"loss": 1.0}
    assert not (third.path / "sft" / "checkpoints").exists(), "a finished stage needs none"


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(url: str, tmp_path: Path) -> None:
    first = Session(url, tmp_path / "run")
    first.run.record_data("0" * 64)
    first.save(1)
    first.save(2)
    first.mirror.push()
    first.mirror.place.write("sft/checkpoints/step-00000002/weights", b"cut")
    saved = Session(url, elsewhere(first)).store.latest()
    assert saved is not None
    assert saved.step == 1


class Dying(Place):
    """A place whose process dies at some operation: that one and all later ones never happen."""

    left = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("put", "write", "delete", "delete_folder"):
            Dying.left -= 1
            if Dying.left < 0:
                raise KeyboardInterrupt
        return super().__getattribute__(name)


Kept = TypeVar("Kept", bound=Session)


def died_while_sending(kind: type[Kept], path: Path, operations: int, last: Callable[[Kept], None] = lambda session: None) -> Kept:
    """A session with steps 1 and 2 at its URL, which died after so many operations on the way of steps 3 and 4, and of `last`."""
    url = f"memory://{uuid.uuid4().hex}/kept"
    whole = open_place(url)
    first = kind(url, path, Dying(url, whole.system, whole.root))
    first.run.record_data("0" * 64)
    Dying.left = 1000
    for step in (1, 2):
        first.save(step)
        first.mirror.push()
    for step in (3, 4):
        first.save(step)
    last(first)
    Dying.left = operations
    with contextlib.suppress(KeyboardInterrupt):
        first.mirror.push()
    return first


@pytest.mark.parametrize("operations", range(12))
def test_a_death_while_sending_leaves_a_whole_checkpoint(tmp_path: Path, operations: int) -> None:
    first = died_while_sending(Session, tmp_path / "run", operations)
    saved = Session(first.mirror.place.url, elsewhere(first)).store.latest()
    assert saved is not None
    assert saved.step in (2, 3, 4)
    assert (saved.path / "weights").read_bytes() == bytes([saved.step]) * 1000


def test_old_checkpoints_stay_until_a_newer_one_has_arrived(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are saved while one push goes on, so that none of those that it has listed arrives whole."""
    first = Session(url, tmp_path / "run")
    first.run.record_data("0" * 64)
    first.save(1)
    first.mirror.push()
    first.save(2)
    first.save(3)
    put = Place.put

    def slow(self: Place, source: Path, name: str) -> None:
        if name.endswith("step-00000002/weights"):
            first.save(4)
            first.save(5)
        put(self, source, name)

    monkeypatch.setattr(Place, "put", slow)
    monkeypatch.setattr(module, "THREADS", 1)
    first.mirror.push()
    assert first.mirror.place.inside("sft/checkpoints").folders()[0] == "step-00000001"
    saved = Session(url, elsewhere(first)).store.latest()
    assert saved is not None and saved.step == 1
    first.mirror.push()
    assert first.mirror.place.inside("sft/checkpoints").folders() == ["step-00000004", "step-00000005"]


def test_the_best_model_so_far_counts_only_when_it_is_whole(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Session(url, tmp_path / "run")
    first.run.record_data("0" * 64)
    best = first.run.stage("sft") / ".model.best"
    best.mkdir()
    for text in ("first", "second"):
        for name in ("model.safetensors", "held_out.json"):
            (best / name).write_text(text * (2 if name == "held_out.json" else 1))
        if text == "first":
            first.mirror.push()
            assert first.mirror.place.read("sft/.model.best/held_out.json") == b"firstfirst"
    send = Mirror._send
    monkeypatch.setattr(Mirror, "_send", lambda self, name, stamp: name != "sft/.model.best/model.safetensors" and send(self, name, stamp))
    first.mirror.push()
    assert first.mirror.place.read("sft/.model.best/held_out.json") is None
    monkeypatch.setattr(Mirror, "_send", send)
    first.mirror.push()
    assert first.mirror.place.read("sft/.model.best/held_out.json") == b"secondsecond"


def test_only_changes_are_sent_and_deletions_follow(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Session(url, tmp_path / "run")
    first.run.record_data("0" * 64)
    for name in ("kept.txt", "dropped.txt", ".hidden", "data/cache", "sft/data/cache", "sft/model.saving/x", "logs/worker.err"):
        (first.path / name).parent.mkdir(parents=True, exist_ok=True)
        (first.path / name).write_text(name)
    first.mirror.push()
    assert set(first.mirror.place.files()) == {"manifest.json", "kept.txt", "dropped.txt", "logs/worker.err"}
    (first.path / "dropped.txt").unlink()
    (first.path / "new.txt").write_text("new")
    path = first.path
    del first  # and with it the lock
    again = Session(url, path)
    again.mirror._sent = read_index(again.path, again.mirror.place)
    sent: list[str] = []
    replacing = Place._replacing
    monkeypatch.setattr(Place, "_replacing", lambda self, name: (sent.append(name), replacing(self, name))[1])
    again.mirror.push()
    assert sent == ["new.txt", "manifest.json"]
    assert set(again.mirror.place.files()) == {"manifest.json", "kept.txt", "new.txt", "logs/worker.err"}
    moved = Session(url, elsewhere(again))
    assert not (moved.path / "logs").exists()


def test_a_folder_that_fell_behind_is_brought_up_and_one_that_is_ahead_stays(url: str, tmp_path: Path) -> None:
    first = Session(url, tmp_path / "run")
    first.run.record_data("0" * 64)
    first.save(1)
    first.mirror.push()
    second = Session(url, elsewhere(first))
    second.save(2)
    second.mirror.push()
    first.save(9)  # never sent: the run went on elsewhere
    path = first.path
    del first
    back = Session(url, path)
    saved = back.store.latest()
    assert saved is not None
    assert saved.step == 2
    back.save(3)
    path = back.path
    del back
    saved = Session(url, path).store.latest()
    assert saved is not None
    assert saved.step == 3, "the folder was ahead"


def test_other_runs_are_refused_and_nothing_is_fetched(url: str, tmp_path: Path) -> None:
    first = Session(url, tmp_path / "run")
    first.run.record_data("0" * 64)
    first.mirror.push()
    with pytest.raises(CheckpointError, match=r"run folder .*kept holds a run of another configuration: run.seed was 1 and is now 2"):
        Session(url, tmp_path / "b", run={"dir": str(tmp_path / "b"), "storage": url, "seed": 2})
    other = Session(f"{url}-other", tmp_path / "c")
    other.run.record_data("0" * 64)
    del other
    with pytest.raises(CheckpointError, match="hold two different runs"):
        Session(url, tmp_path / "c")
    open_place(url).write("manifest.json", b"{")
    with pytest.raises(CheckpointError, match="no valid JSON"):
        Session(url, tmp_path / "d")


def test_a_run_that_had_not_begun_binds_nothing(url: str, tmp_path: Path) -> None:
    first = Session(url, tmp_path / "run")
    first.mirror.push()
    Session(url, tmp_path / "b", run={"dir": str(tmp_path / "b"), "storage": url, "seed": 2})


def test_new_checkpoints_are_sent_while_the_run_works(url: str, tmp_path: Path) -> None:
    session = Session(url, tmp_path / "run")
    session.mirror.start(session.path)
    session.run.record_data("0" * 64)
    session.save(1)
    wait_until(lambda: session.mirror.place.read("sft/checkpoints/step-00000001/manifest.json"))
    (session.path / "summary.json").write_text("{}")
    session.mirror.close()
    assert session.mirror.place.read("summary.json") == b"{}"
    assert json.loads((session.path / INDEX).read_text())["url"] == url


def test_an_outage_is_told_once_and_at_the_end_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    session = Session(f"file://{tmp_path}/kept", tmp_path / "run")
    session.mirror._tell = told.append
    session.mirror.start(session.path)

    def broken(self: Place, name: str) -> None:
        raise OSError(28, "No space left on device")

    replacing = Place._replacing
    monkeypatch.setattr(Place, "_replacing", broken)
    session.run.record_data("0" * 64)
    wait_until(lambda: told)
    time.sleep(0.05)
    assert len(told) == 1
    assert "No space left" in told[0]
    monkeypatch.setattr(Place, "_replacing", replacing)
    wait_until(lambda: len(told) == 2)
    assert "is written again" in told[1]
    monkeypatch.setattr(Place, "_replacing", broken)
    (session.path / "summary.json").write_text("{}")
    with pytest.raises(StorageError, match=r"lacks the last changes of .*No space left.*the same command sends them"):
        session.mirror.close()


def test_a_mirror_that_lost_its_place_sends_nothing_and_says_so(tmp_path: Path) -> None:
    session = Session(f"file://{tmp_path}/kept", tmp_path / "run")
    session.mirror.start(session.path)
    session.mirror.lose("process 7 on elsewhere")
    (session.path / "summary.json").write_text("{}")
    with pytest.raises(StorageError, match=r"process 7 on elsewhere took file://.*over"):
        session.mirror.close()
    assert session.mirror.place.read("summary.json") is None


def test_a_fetch_that_was_cut_short_is_done_again(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Session(url, tmp_path / "run")
    first.run.record_data("0" * 64)
    first.finish()
    first.mirror.push()
    get = Place.get

    def cut(self: Place, name: str, target: Path) -> None:
        if name == "manifest.json":
            raise OSError("gone")
        get(self, name, target)

    monkeypatch.setattr(Place, "get", cut)
    with pytest.raises(StorageError, match="cannot be fetched"):
        Session(url, elsewhere(first))
    monkeypatch.setattr(Place, "get", get)
    shutil.rmtree(elsewhere(first) / "sft" / "model")
    assert Session(url, elsewhere(first)).run.finished("sft") == {"loss": 1.0}


class Searching(Session):
    """A search of one trial: at every step of it a checkpoint, then Tune's pointer to that, and last what Tune goes on from."""

    def __init__(self, url: str, path: Path, place: Place | None = None) -> None:
        super().__init__(url, path, place)
        self.trial = self.path / "tune" / "trial_a"
        self.store = CheckpointStore(self.trial / "checkpoints")

    def save(self, step: int) -> Path:
        def write(folder: Path) -> None:
            (folder / "policy").mkdir()
            (folder / "policy" / "weights").write_bytes(bytes([step]) * 1000)

        saved = self.store.save(step, {"step": step}, write)
        pointer = self.trial / f"checkpoint_{step:06d}"
        pointer.mkdir()
        (pointer / "checkpoint.json").write_text(json.dumps({"trial": "trial_a", "checkpoint": saved.name}))
        self.note(step)
        return saved

    def end(self, step: int) -> None:
        (self.trial / "model").mkdir()
        (self.trial / "model" / "config.json").write_text("{}")
        with (self.path / "tune" / "ended.jsonl").open("a") as ended:
            ended.write(json.dumps({"trial": "trial_a", "step": step}) + "\n")
        self.note(step)

    def note(self, step: int) -> None:
        (self.path / "tune" / "experiment_state-1.json").write_text(json.dumps({"step": step}))


@pytest.mark.parametrize("operations", range(24))
def test_a_death_while_sending_a_search_leaves_whole_checkpoints_and_nothing_that_names_others(tmp_path: Path, operations: int) -> None:
    first = died_while_sending(Searching, tmp_path / "run", operations, last=lambda session: session.end(4))
    url = first.mirror.place.url
    there = open_place(url).files()
    for manifest in [name for name in there if name.endswith("manifest.json") and "/step-" in name]:
        assert manifest.replace("manifest.json", "policy/weights") in there
    moved = Searching(url, elsewhere(first))
    step = json.loads((moved.path / "tune" / "experiment_state-1.json").read_text())["step"]
    pointer = json.loads((moved.trial / f"checkpoint_{step:06d}" / "checkpoint.json").read_text())
    saved = read_checkpoint(moved.trial / "checkpoints" / pointer["checkpoint"]) or moved.store.latest()
    assert saved is not None and saved.step >= step  # what the state names, or where that has been replaced since, the newest
    assert (saved.path / "policy" / "weights").read_bytes() == bytes([saved.step]) * 1000
    ended = moved.path / "tune" / "ended.jsonl"
    if ended.exists():
        assert (moved.trial / "model" / "config.json").is_file()
    if operations == 23:
        assert ended.exists() and step == 4, "nothing died: the operations above are all that there are"


def test_a_checkpoint_of_a_trial_is_sent_when_it_is_there_and_goes_when_it_is_replaced(url: str, tmp_path: Path) -> None:
    session = Searching(url, tmp_path / "run")
    session.mirror.start(session.path)
    session.run.record_data("0" * 64)
    place = session.mirror.place
    for step in (1, 2, 3):
        session.save(step)
        wait_until(lambda step=step: place.read(f"tune/trial_a/checkpoints/step-{step:08d}/manifest.json"))
    wait_until(lambda: place.inside("tune/trial_a/checkpoints").folders() == ["step-00000002", "step-00000003"])
    session.mirror.close()


def test_of_a_search_all_whole_checkpoints_are_fetched_and_no_logs(url: str, tmp_path: Path) -> None:
    """Any of them may be one that a population is about to copy."""
    first = Searching(url, tmp_path / "run")
    first.run.record_data("0" * 64)
    first.save(1)
    first.save(2)
    (first.trial / "logs").mkdir()
    (first.trial / "logs" / "stacks.txt").write_text("...")
    first.mirror.push()
    first.mirror.place.delete("tune/trial_a/checkpoints/step-00000002/manifest.json")
    (elsewhere(first) / "tune" / "trial_a" / "checkpoints" / "step-00000009").mkdir(parents=True)  # never whole, and not there
    moved = Searching(url, elsewhere(first))
    assert [path.name for path in sorted((moved.trial / "checkpoints").iterdir())] == ["step-00000001"]
    assert not (moved.trial / "logs").exists()
    moved.run.finish("tune", {}, {})
    moved.mirror.push()
    third = Searching(url, elsewhere(moved))
    assert not (third.trial / "checkpoints").exists(), "a finished search needs none"


def test_what_a_search_goes_on_from_is_sent_as_it_was_before_the_rest_was_listed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes every few seconds, and large checkpoints take minutes: sent as it is at the end, it would name what is not there."""
    session = Searching(url, tmp_path / "run")
    session.run.record_data("0" * 64)
    session.save(1)
    put = Place.put

    def slow(self: Place, source: Path, name: str) -> None:
        put(self, source, name)
        if name.endswith("policy/weights"):
            session.note(2)

    monkeypatch.setattr(Place, "put", slow)
    session.mirror.push()
    assert session.mirror.place.read("tune/experiment_state-1.json") == b'{"step": 1}'
    monkeypatch.setattr(Place, "put", put)
    session.mirror.push()
    assert session.mirror.place.read("tune/experiment_state-1.json") == b'{"step": 2}'


def test_nothing_is_sent_once_another_run_has_taken_the_url_over(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slept finds out by its next push: the lease is not looked at for a quarter of a minute."""
    monkeypatch.setattr("app.storage.lease.SETTLE_SECONDS", 0.0)
    session = Session(url, tmp_path / "run")
    session.run.record_data("0" * 64)
    place = session.mirror.place
    session.mirror._lease = Lease.acquire(place, session.mirror.lose)
    session.mirror.push()
    place.write(NAME, json.dumps({"token": "theirs", "host": "elsewhere", "pid": 7}).encode())
    session.save(1)
    session.mirror.push()
    assert session.mirror.lost_to == "process 7 on elsewhere"
    assert not place.folders()
    with pytest.raises(StorageError, match=r"process 7 on elsewhere took .*over"):
        session.mirror.close()


def test_the_manifest_of_the_run_stays_at_the_url_while_it_is_written_anew(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the URL holds no run: the next start elsewhere would begin anew and delete the checkpoints."""
    session = Session(url, tmp_path / "run")
    session.run.record_data("0" * 64)
    session.mirror.push()
    session.run.record_data("0" * 64, rows=1)

    def changing(send: Any) -> Any:
        def sent(self: Place, *arguments: Any) -> None:
            send(self, *arguments)
            if "manifest.json" in arguments:
                session.run.record_data("0" * 64, rows=2, sets=["a"])

        return sent

    with monkeypatch.context() as patch:
        for name in ("put", "write"):
            patch.setattr(Place, name, changing(getattr(Place, name)))
        session.mirror.push()
    kept = json.loads(session.mirror.place.read("manifest.json") or b"null")
    assert kept is not None and kept["data"]["rows"] == 1
    session.mirror.push()
    assert json.loads(session.mirror.place.read("manifest.json") or b"null")["data"]["rows"] == 2


@pytest.mark.parametrize("begun", [False, True], ids=["nothing", "a run that read no data"])
def test_a_folder_with_files_of_someone_else_is_refused_and_left_alone(url: str, tmp_path: Path, begun: bool) -> None:
    first = Session(url, tmp_path / "run")
    first.run.record_data("0" * 64)
    first.save(1)
    first.mirror.push()
    folder = tmp_path / "mine"
    if begun:
        RunFolder.open(Recipe.model_validate({"run": {"dir": str(folder)}}), "sft").end_session("failed")
    for name in ("thesis/draft.txt", "other/checkpoints/step-7/weights"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("months of work")
    with pytest.raises(CheckpointError, match=r"run folder .*mine holds no run but other files, such as .*: choose another --run\.dir"):
        Session(url, folder)
    for name in ("thesis/draft.txt", "other/checkpoints/step-7/weights"):
        assert (folder / name).read_text() == "months of work"


def test_a_folder_that_vanishes_while_it_is_looked_at_does_not_end_the_following(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(url, tmp_path / "run")
    manifests, looks = Mirror._manifests, [0]

    def vanishing(self: Mirror) -> Any:
        looks[0] += 1
        if looks[0] == 5:
            raise FileNotFoundError(2, "No such file or directory", "sft/checkpoints")
        return manifests(self)

    monkeypatch.setattr(Mirror, "_manifests", vanishing)
    session.mirror.start(session.path)
    wait_until(lambda: looks[0] >= 5)
    session.run.record_data("0" * 64)
    session.save(1)
    wait_until(lambda: session.mirror.place.read("sft/checkpoints/step-00000001/manifest.json"))
    session.mirror.close()


def test_a_full_local_disk_is_no_fault_of_the_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All has arrived there; only the note of that, which spares a restart some sending, has not been written."""
    session = Session(url, tmp_path / "run")
    session.run.record_data("0" * 64)
    session.save(1)

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filling, "write_json", full)
    session.mirror.push()
    assert session.mirror.place.read("sft/checkpoints/step-00000001/manifest.json")
