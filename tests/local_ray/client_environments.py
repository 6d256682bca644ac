"""Python environments of outside clients, whose libraries must not mix with ours."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from filelock import FileLock

from app.models.gguf import cache_folder

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def client_python(name: str) -> Path:
    """The Python that has what requirements/NAME.txt pins: that of $CORRAL_NAME_PYTHON, else one that is built once and kept in the
    cache folder. Skips the test where no package index can be reached."""
    variable = f"CORRAL_{name.upper()}_PYTHON"
    if os.environ.get(variable):
        return Path(os.environ[variable])
    pins = REQUIREMENTS / f"{name}.txt"
    key = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_folder() / "clients" / f"{name}-{key}"
    python, whole = folder / "bin" / "python", folder / "whole"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not whole.exists():
            venv.create(folder, clear=True)
            pip = [sys.executable, "-m", "pip", f"--python={python}"]  # ours installs there: one of its own would take longer than this
            install = [*pip, "install", "--quiet", "--no-compile", "--no-deps", "--timeout", "10", "--retries", "1", "-r", str(pins)]
            done = subprocess.run(install, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1:] or ["no reason"]
                pytest.skip(f"{name} cannot be installed ({reason[0]}); set {variable} to a Python that has it")
            whole.touch()
    return python
