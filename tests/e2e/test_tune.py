"""A search of four PPO trials that share one scoring service."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.command import HERE, run


def test_search(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, output = run(["tune", f"{HERE}/minimal.toml", f"--run.dir={folder}"], tmp_path / "log")
    assert code == 0, output
    results = json.loads((folder / "summary.json").read_text())["tune"]
    assert len(results["trials"]) == 4
    assert all(trial["error"] is None for trial in results["trials"])
    assert len({trial["config"]["ppo.policy.lr"] for trial in results["trials"]}) == 4
    assert results["best"]["objective"] == max(trial["objective"] for trial in results["trials"])
    assert set(results["best_config"]) == {"ppo.policy.lr", "ppo.epochs"}
    assert f"best: --ppo.policy.lr={results['best_config']['ppo.policy.lr']}" in output
