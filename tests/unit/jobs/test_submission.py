"""What a submission takes along, where it goes, and how it tells what is wrong; against a job server that speaks Ray's protocol."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus

from app.config.loading import load_recipe, with_values
from app.errors import ConfigError, CorralError
from app.run_layout import LOCK
from jobs import job_server, packing
from jobs.main import main
from jobs.packing import EXCLUDES, missing_modules, pack, packages_of, run_folders
from jobs.submission import located

ROOT = Path(__file__).resolve().parents[3]
RECIPE = "jobs/recipes/tiny/pipeline.toml"
TOKEN = "right"


class Job:
    """The end of a job, as the job server tells it."""

    def __init__(self, status: JobStatus, code: int | None = None, message: str = "") -> None:
        self.status, self.driver_exit_code, self.message = status, code, message


def answers(version: str = ray.__version__, status: int = 200, body: str | None = None) -> type[BaseHTTPRequestHandler]:
    """A dashboard of some Ray version that wants TOKEN, or that answers everything with one body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given, answer = self.headers.get("Authorization"), (status, body or json.dumps({"version": "4", "ray_version": version}))
            if given is None:
                answer = (401, "Unauthorized: Missing authentication token")
            elif given != f"Bearer {TOKEN}":
                answer = (403, "Forbidden: Invalid authentication token")
            elif self.path.startswith("/api/jobs"):
                answer = (404, "Job nothing does not exist")
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1].encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            """Not on stderr."""

    return Handler


@pytest.fixture
def dashboard() -> Iterator[Callable[..., str]]:
    """Starts a job server; returns its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(**how: Any) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), answers(**how))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def authorised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The headers that Ray makes of a token; Ray itself reads its token once per process."""
    from ray.dashboard.modules import dashboard_sdk

    monkeypatch.setattr(dashboard_sdk, "get_auth_headers_if_auth_enabled", lambda headers: {"Authorization": f"Bearer {TOKEN}"})
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.chdir(ROOT)


def refused(address: str) -> str:
    with pytest.raises(ConfigError) as caught:
        job_server.connect(address)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"version": "2.9.3"}, rf"runs Ray 2.9.3, and this is Ray {ray.__version__}: install"),
        ({"body": "<html>"}, "is no Ray dashboard"),
        ({"body": "{}"}, "no Ray cluster answers at"),
        ({"status": 500}, "is no Ray dashboard"),
        ({"status": 404}, "no Ray cluster answers at"),
    ],
)
def test_a_server_that_cannot_be_used(dashboard: Callable[..., str], how: dict[str, Any], said: str) -> None:
    assert said in refused(dashboard(**how))


@pytest.mark.parametrize(("headers", "said"), [({}, "asks for a token"), ({"Authorization": "Bearer wrong"}, "refuses the token")])
def test_tokens(dashboard: Callable[..., str], monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], said: str) -> None:
    from ray.dashboard.modules import dashboard_sdk

    monkeypatch.setattr(dashboard_sdk, "get_auth_headers_if_auth_enabled", lambda before: headers)
    message = refused(dashboard())
    assert said in message
    assert "RAY_AUTH_TOKEN" in message


@pytest.mark.parametrize(
    ("address", "said"), [("http://127.0.0.1:9", "no Ray cluster answers"), ("ray://head:10001", "such as http://head")]
)
def test_addresses(address: str, said: str) -> None:
    assert said in refused(address)


def test_the_given_address_wins_over_the_environment(dashboard: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    address = dashboard()
    assert job_server.connect(address.removeprefix("http://")).get_address() == address
    with pytest.raises(ConfigError, match=r"at http://127.0.0.1:9 "):
        job_server.connect(None)


def test_a_job_that_nobody_knows(dashboard: Callable[..., str]) -> None:
    server = job_server.connect(dashboard())
    with pytest.raises(ConfigError, match="Job nothing does not exist"):
        job_server.ask(lambda: server.get_job_info("nothing"))


class Broken:
    """A server whose connection breaks after some output; its job ends with the second look."""

    def __init__(self, *parts: str) -> None:
        self.parts, self.looks = parts, 0

    async def tail_job_logs(self, job: str) -> Any:
        for part in self.parts if self.looks else self.parts[:2]:
            yield part
        if not self.looks:
            raise RuntimeError("closed unexpectedly")

    def get_job_info(self, job: str) -> Job:
        self.looks += 1
        return Job(JobStatus.SUCCEEDED if self.looks > 1 else JobStatus.RUNNING)


def test_following_goes_on_after_a_broken_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "RECONNECT_SECONDS", 0.0)
    written: list[str] = []
    info = job_server.follow(Broken("one\n", "two\n", "three\n"), "job", written.append)  # type: ignore[arg-type]
    assert "".join(written) == "one\ntwo\nthree\n"
    assert info.status == JobStatus.SUCCEEDED


def test_a_job_that_was_silent_for_long_is_not_lost_with_the_first_broken_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quiet(Broken):
        async def tail_job_logs(self, job: str) -> Any:
            if not self.looks:
                await asyncio.sleep(0.3)  # a step of a large model: many minutes without a line
                raise RuntimeError("closed unexpectedly")
            yield "done\n"

        def get_job_info(self, job: str) -> Job:
            self.looks += 1
            if self.looks == 1:
                raise ConnectionError("refused")
            return Job(JobStatus.SUCCEEDED)

    monkeypatch.setattr(job_server, "RECONNECT_SECONDS", 0.0)
    monkeypatch.setattr(job_server, "LOST_SECONDS", 0.2)
    assert job_server.follow(Quiet(), "job", lambda text: None).status == JobStatus.SUCCEEDED  # type: ignore[arg-type]


def test_following_ends_when_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Broken):
        def get_job_info(self, job: str) -> Job:
            raise ConnectionError("refused")

    monkeypatch.setattr(job_server, "RECONNECT_SECONDS", 0.0)
    monkeypatch.setattr(job_server, "LOST_SECONDS", 0.0)
    with pytest.raises(CorralError, match="job raysubmit_1 may go on: `corral logs raysubmit_1 --follow`"):
        job_server.follow(Silent("one\n"), "raysubmit_1", lambda text: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("job", "code", "line"),
    [
        (Job(JobStatus.SUCCEEDED, 0), 0, "job j: SUCCEEDED"),
        (Job(JobStatus.FAILED, 2, "Job entrypoint command failed"), 2, "job j: FAILED"),
        (Job(JobStatus.FAILED, None, "Failed to set up\nruntime environment"), 1, "job j: FAILED: Failed to set up runtime environment"),
        (Job(JobStatus.STOPPED), 130, "job j: STOPPED"),
    ],
)
def test_what_the_end_of_a_job_means(job: Any, code: int, line: str) -> None:
    assert job_server.exit_code(job) == code
    assert job_server.outcome("j", job) == line


def test_the_entry_point_is_shown_before_it_is_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", RECIPE, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"python -m jobs pipeline {RECIPE} --run.dir={ROOT / 'runs/demo'}\n# ")
    assert main(["submit", "sft", f"{ROOT}/{RECIPE}", "--dry-run", "--run.dir", "/shared/a", "--sft.epochs=1"]) == 0
    assert capsys.readouterr().out.startswith(f"python -m jobs sft {RECIPE} --run.dir /shared/a --sft.epochs=1")
    assert main(["submit", "nothing", RECIPE]) == 2


def test_without_a_cluster_one_line_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", RECIPE, "--address", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9" in error
    assert error.count("\n") == 1


def test_our_own_code_goes_along_and_nothing_large() -> None:
    package = pack(ROOT)
    assert package.holds("app/data/corpus.py")  # an unanchored `data` would leave it out
    assert package.holds(RECIPE)
    assert not package.holds("docs")
    assert not package.holds("/etc/hosts")
    assert not missing_modules(package)
    assert package.bytes < 10 * 2**20


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without our code: a recipe, data on both sides of the border, an ignored file and a run folder in an odd place."""
    files = {"a.toml": "", "data/big.jsonl": "x" * 5000, "small.jsonl": "{}", "notes/secret.txt": "", ".rayignore": "notes\n"}
    files |= {"old/run/manifest.json": "{}", f"old/run/{LOCK}": "", "old/run/sft/model/weights": "x", "old/manifest.json": "{}"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_run_folders_and_data_stay_behind(project: Path) -> None:
    assert run_folders(project, EXCLUDES) == ["old/run"]
    package = pack(project)
    assert set(package.sizes) == {"a.toml", "small.jsonl", ".rayignore", "old/manifest.json"}
    assert [Path(module).name for module in missing_modules(package)] == ["app", "serve", "jobs"]


def test_what_is_counted_is_what_ray_sends(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from ray._private.runtime_env.packaging import create_package

    package, target = pack(project), tmp_path_factory.mktemp("package") / "all.zip"
    create_package(str(project), target, include_gitignore=True, excludes=list(package.excludes))
    assert target.stat().st_size == package.bytes + 22  # the end of the archive's directory


@pytest.mark.parametrize(
    ("given", "expected"), [("data/big.jsonl", "--data.path={root}/data/big.jsonl"), ("small.jsonl", None), ("nowhere.jsonl", None)]
)
def test_data_that_stays_behind_is_named_absolutely(
    project: Path, capsys: pytest.CaptureFixture[str], given: str, expected: str | None
) -> None:
    assert main(["submit", "sft", "a.toml", "--dry-run", f"--data.path={given}"]) == 0
    words = capsys.readouterr().out.splitlines()[0].split()
    assert [word for word in words if word.startswith("--data.path=/")] == ([expected.format(root=project)] if expected else [])


LOCATED = {
    "run.dir": ("runs/a", "{root}/runs/a"),
    "model.path": ("data/model", "{root}/data/model"),
    "reward.path": ("data/model", "{root}/data/model"),
    "data.path": ("data/*.jsonl", "{root}/data/*.jsonl"),
    "data.sets.mine.path": ("data/big.jsonl", "{root}/data/big.jsonl"),
    "ppo.pretraining.path": ("data/big.jsonl", "{root}/data/big.jsonl"),
    "reward.parts.judge": (
        '{type = "reward_model", paths = ["data/model", "owner/model"]}',
        '{type = "reward_model", paths = ["{root}/data/model", "owner/model"]}',
    ),
    "serving.models.judge.path": ("data/model", "{root}/data/model"),
    "serving.chat.guide.path": ("data/model", "{root}/data/model"),
    "serving.token_file": ("data/token", "{root}/data/token"),
    "serving.access_log": ("access.jsonl", "{root}/access.jsonl"),
}
"""Key -> what is given, and what the job must read."""


@pytest.mark.parametrize(("key", "given", "expected"), [(key, *pair) for key, pair in LOCATED.items()])
def test_every_path_that_stays_behind_is_named_absolutely(project: Path, key: str, given: str, expected: str) -> None:
    """As the job reads it from the submitted command line; what goes along, and what only a hub has, is left as it is."""
    for name in ("model/config.json", "token"):
        (project / "data" / name).parent.mkdir(exist_ok=True)
        (project / "data" / name).write_text("{}")
    package, words = pack(project), [f"--{key}={given}"]
    here = load_recipe("a.toml", words)
    there = load_recipe("a.toml", [*words, *located(here, package)])
    wanted = load_recipe("a.toml", [f"--{key}={expected.replace('{root}', str(project))}"])
    assert there == with_values(wanted, {"run.dir": there.run.dir}) and Path(there.run.dir).is_absolute()
    if key not in ("run.dir", "serving.access_log"):
        goes_along = load_recipe("a.toml", [f"--{key}={given.replace('data/', 'small')}"])
        assert [word for word in located(goes_along, package) if not word.startswith("--run.dir=")] == []


def test_a_model_whose_name_has_dots_is_located_too(project: Path) -> None:
    (project / "b.toml").write_text('[serving.models."judge-1.4b"]\npath = "data/big.jsonl"\n')
    here = load_recipe("b.toml")
    there = load_recipe("b.toml", located(here, pack(project)))
    assert {name: model.path for name, model in there.serving.models.items()} == {"judge-1.4b": str(project / "data" / "big.jsonl")}


def test_a_package_above_the_limit_is_refused_with_its_largest_files(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packing, "LIMIT_BYTES", 2000)
    (project / "dump.bin").write_bytes(bytes(3000))
    assert main(["submit", "a.toml", "--address", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert "the largest files: dump.bin (0.0 MiB), " in error
    assert ".rayignore" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("recipe", ["notes/a.toml", "../a.toml", "data/a.toml"])
def test_a_recipe_that_stays_behind_is_refused(project: Path, capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    (project / recipe).write_text("")
    assert main(["submit", recipe, "--dry-run"]) == 2
    assert f"{recipe} does not go along" in capsys.readouterr().err
    (project / recipe).unlink()


@pytest.mark.parametrize("base", ["notes/base.toml", "../base.toml"])
def test_a_recipe_that_extends_one_that_stays_behind_is_refused(project: Path, capsys: pytest.CaptureFixture[str], base: str) -> None:
    (project / base).write_text("")
    (project / "middle.toml").write_text(f'extends = ["{base}"]\n')
    (project / "b.toml").write_text('extends = ["a.toml", "middle.toml"]\n')
    assert main(["submit", "b.toml", "--dry-run"]) == 2
    assert f"{base} does not go along" in capsys.readouterr().err
    (project / base).unlink()


def test_what_git_ignores_goes_along_where_ray_is_told_to_send_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / ".gitignore").write_text("small.jsonl\n")
    assert not pack(project).holds("small.jsonl")
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert pack(project).holds("small.jsonl") and not pack(project).holds("notes")


def test_a_lock_becomes_a_runtime_environment(project: Path) -> None:
    found = packages_of(ROOT / "requirements" / "cuda.txt", "2.13.0")
    packages: Any = found["packages"]
    assert packages[0] == "torch==2.13.0"
    assert any(line.startswith("vllm==") for line in packages)
    assert not any(line.startswith("ray==") for line in packages)
    for text, said in (("vllm>=1\n", "vllm>=1 is no pinned"), ("# nothing\n", "it is empty")):
        (project / "lock.txt").write_text(text)
        with pytest.raises(ConfigError, match=said):
            packages_of(project / "lock.txt", "2.13.0")
    with pytest.raises(ConfigError, match="cannot be read"):
        packages_of(project / "nowhere.txt", "2.13.0")
