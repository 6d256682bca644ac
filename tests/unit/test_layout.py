"""The layout rules of the project: import direction, light imports, module names, file length."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("app", "serve", "jobs")
MODULES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400
REACH_ENGINES = {"app.workers", "app.stages", "app.evaluation"}
"""Of app/, what may import ray, deepspeed or vllm."""
VAGUE = {"utils", "util", "common", "misc", "helpers"}


def test_imports_point_downwards() -> None:
    """The contracts stand in pyproject.toml; run `lint-imports` to see where one is broken."""
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_no_module_stands_outside_the_contracts() -> None:
    """One that no layer names may import anything, and be imported from anywhere."""
    inside = {f"app.{path.stem}" for path in (ROOT / "app").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    modules = inside - {"app.__init__"}
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers, light = (next(contract for contract in contracts if contract["type"] == kind) for kind in ("layers", "forbidden"))
    named = [name for layer in layers["layers"] for name in layer.split(" | ")]
    assert sorted(named) == sorted({*modules, "serve", "jobs"})
    assert sorted(light["source_modules"]) == sorted(modules - REACH_ENGINES)


def test_light_modules_load_no_engine() -> None:
    """One after the other in one process: the first of them does not even load torch."""
    heavy = ("ray", "deepspeed", "vllm", "transformers", "torch")
    modules = ("jobs.main", "app.numerics", "app.config.loading", "app.planning.plan")
    script = f"import importlib, sys\nfor module in {modules!r}:\n    importlib.import_module(module)\n"
    script += f"    print(module, *(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    assert loaded == dict.fromkeys(modules, "torch") | {"jobs.main": ""}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_module_names(path: Path) -> None:
    """A module named like a package that Ray puts on every worker's path, or like a standard module, shadows it."""
    name = path.stem
    if path.parent.name in PACKAGES or len(path.parts) > 2:
        assert name not in {*PACKAGES, "ray"} and name not in VAGUE
        assert name not in sys.stdlib_module_names or name in ("__init__", "__main__")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_file_length(path: Path) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= MAX_LINES


def test_the_root_holds_only_the_fixed_entries() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    files = {".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "cluster.yaml", "pyproject.toml"}
    folders = {".ci", "app", "bench", "deploy", "docs", "jobs", "requirements", "serve", "tests"}
    assert top <= files | folders
