"""The run folder: which run it belongs to, which of its stages are finished, and what each of them came from.

`DIR/manifest.json` names the run (config, data, code version) and the chain data -> SFT -> RM -> PPO; `DIR/<stage>/manifest.json`
is written last of all a stage writes, so a stage without one is unfinished. `DIR/<stage>/parents.json` says what it began with.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from app.config.recipe import Recipe
from app.config.tune import BY_ANSWERS
from app.durable import damage, file_hashes, hash_of, read_json, without_non_finite, write_json, wrong_size
from app.errors import CheckpointError
from app.process_record import code_version, me, ray_job
from app.run_layout import CHECKPOINTS, LOCK, MANIFEST, MODEL, PARENTS, SUMMARY_FILE

NOT_IDENTITY = re.compile(
    r"run\.(dir|storage|resume|deadline_seconds|stacks_after)|(sft|rm)\.keep_checkpoints|tracking\..*|alarms\..*|evaluation\..*"
    r"|ppo\.keep_rollouts|(ppo|rollout)\.max_restarts|tune\.(concurrent|max_failures)"
)
"""Keys that may change between two starts of one run: they do not touch what is computed."""
DECIDES_ANSWERS = ("evaluation.seed", "evaluation.prompts")
"""Keys that may not change after all where trials are compared by answers to held-out prompts."""
SHOWN_DIFFERENCES = 5


class RunFolder:
    """Make one with `RunFolder.open`. `path` is absolute."""

    def __init__(self, path: Path, identity: dict[str, Any], manifest: dict[str, Any], lock: FileLock) -> None:
        self.path = path
        self._lock = lock  # held as long as this process lives, or this object
        self.code_version: str = manifest["sessions"][-1]["code_version"]
        self._identity = identity
        self._manifest = manifest
        self._started: dict[str, float] = {}
        self._hashed: dict[str, str] = {}  # stage -> `sha256` of its manifest, where this process has hashed the files of that one

    @classmethod
    def open(cls, recipe: Recipe, command: str, fill: Callable[[Path, Mapping[str, Any]], None] | None = None) -> RunFolder:
        """Make `run.dir`, or go on in it. fill: brings the locked folder, given with the run's identity, to what is kept elsewhere.

        Raises CheckpointError, before anything is written, where the folder holds a run of another configuration (named key
        by key), another process works in it, or it is not empty although `run.resume` is false.
        """
        path = Path(recipe.run.dir).absolute()
        identity = run_identity(recipe)
        now = time.time()
        manifest: dict[str, Any] = {"created": now, "config": recipe.model_dump(mode="json"), "data": None, "stages": {}, "sessions": []}
        try:
            refuse_place(path, resume=recipe.run.resume)
            path.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(path)  # before the manifest is read: a run that is just ending may still write it
            try:
                if fill is not None:
                    fill(path, identity)
                manifest = refuse_other_run(path, identity) or manifest
                manifest["sessions"].append({"command": command, "started": now, "code_version": code_version(), **me(), "job": ray_job()})
                write_json(path / MANIFEST, manifest)
            except BaseException:
                lock.release()
                raise
        except OSError as error:
            raise CheckpointError(f"run folder {path} cannot be written ({error.strerror}): choose another --run.dir") from error
        return cls(path, identity, manifest, lock)

    def stage(self, name: str) -> Path:
        """The folder of a stage, made where it is missing. The first call starts the stage's clock."""
        self._started.setdefault(name, time.monotonic())
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    def end_session(self, outcome: str, reason: str | None = None) -> None:
        """Note how this start of the run ended: `finished`, `interrupted` or `failed`. A session without a note was killed."""
        self._manifest["sessions"][-1] |= {"ended": time.time(), "outcome": outcome} | ({"reason": reason} if reason else {})
        write_json(self.path / MANIFEST, self._manifest)

    def record_data(self, sha256: str, **facts: Any) -> None:
        """Note which data this run reads. CheckpointError where it is other data than the run began with."""
        known = self._manifest["data"]
        if known is not None and known["sha256"] != sha256:
            raise CheckpointError(
                f"the data of run folder {self.path} has changed since the run began "
                f"(sha256 {known['sha256'][:12]} then, {sha256[:12]} now): restore the data, or choose another --run.dir"
            )
        self._manifest["data"] = {"sha256": sha256, **facts}
        write_json(self.path / MANIFEST, self._manifest)

    def begin(self, stage: str, parents: Mapping[str, str]) -> None:
        """Note what a stage starts from, as `finish` is given it. CheckpointError where checkpoints, which it would go on from, are of one
        that started from something else."""
        folder = self.stage(stage)
        record = folder / PARENTS
        before = read_json(record) if record.is_file() else (self.manifest(stage) or {"parents": parents})["parents"]
        changed = sorted(name for name in {*before, *parents} if before.get(name) != parents.get(name))
        if changed and any((folder / CHECKPOINTS).glob(f"[!.]*/{MANIFEST}")):
            raise CheckpointError(
                f"{folder}: its checkpoints began with another {' and '.join(changed)}: restore that, or remove {folder} "
                f"to begin {stage} anew"
            )
        write_json(record, dict(parents))

    def finish(self, stage: str, results: Mapping[str, Any], parents: Mapping[str, str]) -> str:
        """Commit a stage: nothing in its model folder may change after this.

        `results`: JSON-able; `parents`: what it came from, name (`data`, `model`, or a stage) -> content hash. Returns the
        stage's own content hash: that of its model folder, or of its results where it leaves no model.
        """
        folder = self.stage(stage)
        clean = without_non_finite(dict(results))
        model = folder / MODEL
        files = {f"{MODEL}/{name}": record for name, record in file_hashes(model).items()} if model.is_dir() else {}
        manifest = {
            "stage": stage,
            "config": self._identity,
            "results": clean,
            "parents": dict(parents),
            "data": self._manifest["data"],
            "code_version": self.code_version,
            "seconds": round(time.monotonic() - self._started[stage], 3),
            "finished": time.time(),
            "sha256": content_hash(files, clean),
            "files": files,
        }
        write_json(folder / MANIFEST, manifest)
        self._enter(stage, manifest)
        self._hashed[stage] = str(manifest["sha256"])
        return self._hashed[stage]

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The results of a finished stage; None where its manifest, one of its files or the parent it came from is missing or changed."""
        manifest = self.manifest(stage)
        if manifest is None or not self._is_current(manifest) or damage(self.path / stage, manifest["files"]):
            self._hashed.pop(stage, None)
            return None
        self._hashed[stage] = manifest["sha256"]
        if self._manifest["stages"].get(stage, {}).get("sha256") != manifest["sha256"]:
            self._enter(stage, manifest)  # the process that finished it was killed before it could
        return dict(manifest["results"])

    def results(self, stage: str) -> dict[str, Any] | None:
        """As `finished`, for a process that is done with the stage: files that it has hashed already (in `finish` too, gigabytes of
        weights) are looked at for their sizes alone."""
        manifest = self.manifest(stage)
        if manifest is None or self._hashed.get(stage) != manifest["sha256"]:
            return self.finished(stage)
        whole = self._is_current(manifest) and wrong_size(self.path / stage, manifest["files"]) is None
        return dict(manifest["results"]) if whole else None

    def _enter(self, stage: str, manifest: Mapping[str, Any]) -> None:
        """Note a finished stage in the run's own manifest."""
        self._manifest["stages"][stage] = {key: manifest[key] for key in ("parents", "sha256", "seconds", "code_version", "finished")}
        write_json(self.path / MANIFEST, self._manifest)

    def _is_current(self, manifest: Mapping[str, Any]) -> bool:
        """Whether a stage is one of this run, and came from the parents that are there now."""
        parents = ((self.manifest(name), digest) for name, digest in manifest["parents"].items())
        return saved_identity(manifest["config"]) == self._identity and all(
            parent is None or parent["sha256"] == digest for parent, digest in parents
        )

    def model(self, stage: str) -> str:
        """The model folder of a finished stage. Raises CheckpointError where the stage is not finished or its files have changed."""
        if self.finished(stage) is None:
            raise CheckpointError(
                f"{self.path / stage}: this stage is not finished, or its files have changed since: "
                f"`corral {stage}` or `corral pipeline` with this --run.dir completes it"
            )
        return str(self.path / stage / MODEL)

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """What `finish` wrote for a stage (`results`, `parents`, `sha256`, `seconds`, ...), or None."""
        path = self.path / stage / MANIFEST
        return read_json(path) if path.is_file() else None

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Replace `summary.json`; numbers that are not finite become null."""
        path = self.path / SUMMARY_FILE
        write_json(path, without_non_finite(dict(summary)))
        return path


def run_identity(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of everything that decides what a run computes."""
    return _identity(recipe.model_dump(mode="json"))


def saved_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version of the code saved, completed by the defaults of keys that it did not have yet."""
    sections = {key[:end] for key in identity for end, sign in enumerate(key) if sign == "."}
    defaults = dict(leaves(Recipe().model_dump(mode="json")))
    return _deciding({key: value for key, value in defaults.items() if key not in sections} | dict(identity))


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    return _deciding(dict(leaves(config)))


def _deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    answers = DECIDES_ANSWERS if values.get("tune.objective") in BY_ANSWERS else ()
    return {key: value for key, value in values.items() if key in answers or not NOT_IDENTITY.fullmatch(key)}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_blank(manifest: Mapping[str, Any]) -> bool:
    """Whether a run ended before it had read its data: it holds nothing, and the next one may have any configuration."""
    return manifest.get("data", "absent") is None and not manifest.get("stages")


def lock_folder(path: Path) -> FileLock:
    """Keep a second run out of the folder. The operating system frees the lock when the process ends, however it ends."""
    lock = FileLock(path / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"run folder {path} is in use by another process: wait for it to end, stop it, or choose another --run.dir"
        ) from error
    return lock


def refuse_place(path: Path, *, resume: bool) -> None:
    """CheckpointError for a file, and without `run.resume` for a folder that is not empty."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"run folder {path} is a file: choose another --run.dir")
    if not resume and path.is_dir() and any(path.iterdir()):
        raise CheckpointError(f"run folder {path} is not empty and run.resume is false: choose another --run.dir, or set run.resume = true")


def refuse_other_run(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the run to go on with; None where there is none yet. CheckpointError where it is another run's."""
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).exists() else {"data": None}
    if is_blank(manifest):
        return None
    refuse_other_config(path, manifest, identity)
    return manifest


def refuse_other_config(path: Path | str, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """CheckpointError that names the keys in which the run in `path` differs from this one."""
    try:
        before = saved_identity(_identity(manifest["config"]))
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}/{MANIFEST} is no manifest of a run: choose another --run.dir") from error
    absent = object()
    keys = [key for key in sorted({*before, *identity}) if before.get(key, absent) != identity.get(key, absent)]
    if not keys:
        return
    shown = [f"{key} was {before.get(key, 'absent')!r} and is now {identity.get(key, 'absent')!r}" for key in keys[:SHOWN_DIFFERENCES]]
    if len(keys) > SHOWN_DIFFERENCES:
        shown.append(f"{len(keys) - SHOWN_DIFFERENCES} more")
    raise CheckpointError(
        f"run folder {path} holds a run of another configuration: {'; '.join(shown)}. "
        "Choose another --run.dir, or restore the old values to go on"
    )


def content_hash(files: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    """`tree_hash` of the model folder whose files these are; without files, a hash of the results."""
    if files:
        return hash_of({name.removeprefix(f"{MODEL}/"): record for name, record in files.items()})
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
