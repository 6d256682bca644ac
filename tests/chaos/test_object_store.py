"""A run whose folder is kept in S3 loses its machine, and goes on from an empty folder on another one."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from pyarrow import fs as arrow

from app.storage.place import Place, open_place, require_writable
from tests.e2e.command import MINIMAL, RUN_SECONDS, kill_driver, run, start
from tests.local_ray.client_environments import client_python
from tests.waiting import wait_until

STEPS = 8


@dataclass(frozen=True)
class Bucket:
    """A bucket of a server on this machine. variables: the environment in which its URLs are known."""

    name: str
    variables: dict[str, str]

    def place(self, folder: str) -> Place:
        return open_place(f"s3://{self.name}/{folder}")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    variables = {"AWS_ENDPOINT_URL": f"http://{address}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = [str(client_python("moto").with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "server.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server:
        try:
            _wait_for_server(port, server, tmp_path / "server.log")
            arrow.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True).create_dir("runs")
            yield Bucket("runs", variables)
        finally:
            server.terminate()


def _wait_for_server(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, "the server", pause=0.1, process=server, log=log)


def test_objects_come_back(bucket: Bucket, tmp_path: Path) -> None:
    place = bucket.place("a")
    require_writable(place)
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(bytes(range(256)) * 100_000)  # more than one part of an upload
    place.write("x/y.json", b"one")
    place.write("x/y.json", b"two!")
    place.put(source, "x/z/model.bin")
    assert place.files() == {"x/y.json": 4, "x/z/model.bin": source.stat().st_size}
    assert (place.folders(), place.inside("x").folders()) == (["x"], ["z"])
    assert (place.read("x/y.json", -2), place.read("absent")) == (b"o!", None)
    place.get("x/z/model.bin", back)
    assert back.read_bytes() == source.read_bytes()
    place.delete("x/y.json")
    place.delete("x/y.json")
    place.delete_folder("x")
    assert place.files() == {}


def test_a_bucket_that_is_not_there_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    code, said = run(["ppo", MINIMAL, f"--run.dir={tmp_path / 'run'}", "--run.storage=s3://absent/run"], tmp_path / "log")
    assert code != 0
    assert said.count("\n") == 1 and "run.storage = s3://absent/run: cannot be written" in said and "NO_SUCH_BUCKET" in said


def test_a_run_goes_on_elsewhere(bucket: Bucket, tmp_path: Path) -> None:
    """SIGKILL of the driver when the checkpoint of a step has arrived, and the loss of its folder."""
    place, log = bucket.place("ppo"), tmp_path / "log"
    options = ["ppo", MINIMAL, f"--run.storage={place.url}", f"--ppo.steps={STEPS}", "--ppo.save_every=1"]
    here, there = tmp_path / "here", tmp_path / "there"
    first = start([*options, f"--run.dir={here}"], log)

    def arrived() -> bool:
        return any(name.startswith("ppo/checkpoints/") and name.endswith("manifest.json") for name in place.files())

    wait_until(arrived, "a checkpoint in the bucket", seconds=RUN_SECONDS, pause=0.2, process=first, log=log)
    _, alive = psutil.wait_procs(kill_driver(first), timeout=60)
    assert not alive
    shutil.rmtree(here)
    code, said = run([*options, f"--run.dir={there}"], tmp_path / "second.log")
    assert code == 0, said
    assert "sft: already finished" in said and "rm: already finished" in said
    kept = json.loads(place.read("summary.json") or b"")
    assert kept == json.loads((there / "summary.json").read_text())
    metrics = [json.loads(line) for line in (place.read("metrics.jsonl") or b"").splitlines()]
    assert sorted({row["step"] for row in metrics if row["stage"] == "ppo"}) == list(range(1, STEPS + 1))
    assert not [name for name in place.files() if name.startswith(".probe") or name == ".lease.json"]
