"""Does a search find anything? `python -m bench.tuning bad-start` and `python -m bench.tuning around`, each half an hour or more on two
cores.

bad-start: the default learning rate x 30 and KL coefficient x 20; how much of the default's gold gain the best of a search recovers.
around: 16 configurations around the default; the winner trained again on three fresh seeds, paired with the default prompt by prompt.

Searches use the models of one seed; gains are those of other seeds, whose prompts no search has seen.

Runs and records lie in `runs/bench-tuning`, and what is finished there is taken as it is. Prints sections for docs/results/tuning.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.config.loading import load_recipe, resolved
from app.evaluation_statistics import paired_bootstrap
from app.search.results import as_options

WORK = Path("runs/bench-tuning")
RECIPE = "jobs/recipes/tiny/ppo.toml"
RATES, COEFFICIENT = ("ppo.policy.lr", "ppo.critic.lr"), "ppo.kl.coef"
RATE_FACTOR, COEFFICIENT_FACTOR = 30, 20
FRESH_SEEDS = (11, 12, 13)
PROMPTS = 256
SEARCH = ("--tune.trials=16", "--tune.searcher=optuna", "--tune.scheduler=asha", "--tune.kl_price=0.0")
OBJECTIVES = {"gold": ("--tune.kl_budget=10", "--tune.eval_prompts=256"), "held_out": ()}
"""What trials are judged by, with what belongs to it: the gold judge under a KL budget; or the reward model's score alone."""


def corral(command: str, folder: Path, *options: str) -> dict[str, Any]:
    """The summary of a command in a run folder of its own; done once."""
    words = [command, RECIPE, f"--run.dir={folder}", f"--evaluation.examples={PROMPTS}", f"--evaluation.prompts={PROMPTS}", *options]
    if not (folder / "summary.json").is_file():
        print("corral", shlex.join(words), flush=True)
        subprocess.run([sys.executable, "-m", "jobs", *words], check=True)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def loguniform(key: str, low: float, high: float) -> str:
    return f'--tune.space.{key}={{type = "loguniform", low = {low:g}, high = {high:g}}}'


def golds(folder: Path) -> list[float]:
    """The gold score of each held-out answer after PPO."""
    return [json.loads(line)["gold_after"] for line in (folder / "examples.jsonl").read_text().splitlines()]


def models_of(folder: Path) -> list[str]:
    return [f"--model.path={folder / 'sft/model'}", f"--reward.path={folder / 'rm/model'}"]


def cost(search: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What the search took: seconds, and PPO steps beside those of one run of the default."""
    rows = search["tune"]["trials"]
    ends = [row["status"] for row in rows]
    taken = sum(row["steps"] for row in rows)
    return {"trials": len(rows), "steps": taken, "runs": taken / steps, "ends": {end: ends.count(end) for end in dict.fromkeys(ends)}}


def searched(folder: Path, objective: str, *options: str) -> dict[str, Any]:
    """Summary of a search with the SFT and reward model of the default run."""
    corral("ppo", WORK / "default")
    return corral("tune", folder, *options, *models_of(WORK / "default"), *SEARCH, f"--tune.objective={objective}", *OBJECTIVES[objective])


def default_run(seed: int) -> Path:
    """Folder of the default recipe's run on a fresh seed, SFT and reward model included."""
    folder = WORK / f"default-{seed}"
    corral("ppo", folder, f"--run.seed={seed}")
    return folder


def retrained(folder: Path, seed: int, *options: str) -> dict[str, Any]:
    """Summary of PPO from the models of `default_run(seed)`, on its prompts, under other options."""
    return corral("ppo", folder, f"--run.seed={seed}", *models_of(default_run(seed)), *options)


def bad_start(objective: str) -> dict[str, Any]:
    """The planted start, a search from it, and the default."""
    default, seed = resolved(load_recipe(RECIPE)), FRESH_SEEDS[0]
    planted = {key: default[key] * RATE_FACTOR for key in RATES} | {COEFFICIENT: default[COEFFICIENT] * COEFFICIENT_FACTOR}
    # two decades below the planted values, half a decade above: the search does not know which way they are wrong
    space = [loguniform(key, value / 100, value * 3) for key, value in planted.items()]
    search = searched(WORK / f"bad-start-{objective}", objective, *as_options(planted), *space)
    runs = {
        "default": corral("ppo", default_run(seed), f"--run.seed={seed}"),
        "planted": retrained(WORK / f"planted-{seed}", seed, *as_options(planted)),
        "best": retrained(WORK / f"bad-start-{objective}-best-{seed}", seed, *as_options(search["tune"]["best_config"])),
    }
    gains = {name: run["ppo"]["gold_gain"] for name, run in runs.items()}
    return {
        "planted": planted,
        "best": search["tune"]["best_config"],
        "gains": gains,
        "recovered": gains["best"]["mean"] / gains["default"]["mean"],
        **cost(search, default["ppo.steps"]),
    }


def around(objective: str) -> dict[str, Any]:
    """A search around the default, and its winner against the default on fresh seeds."""
    default = resolved(load_recipe(RECIPE))
    space = [
        *(loguniform(key, default[key] / 4, default[key] * 4) for key in (*RATES, COEFFICIENT)),
        '--tune.space.ppo.epochs={type = "int", low = 1, high = 3}',
        '--tune.space.ppo.minibatches={type = "choice", values = [3, 4, 6]}',
    ]
    search = searched(WORK / f"around-{objective}", objective, *space)
    best, pairs = search["tune"]["best_config"], {}
    for seed in FRESH_SEEDS:
        ours = WORK / f"around-{objective}-best-{seed}"
        retrained(ours, seed, *as_options(best))
        pairs[seed] = [a - b for a, b in zip(golds(ours), golds(default_run(seed)), strict=True)]
    differences = {str(seed): paired_bootstrap(deltas, 2000, seed).as_dict() for seed, deltas in pairs.items()}
    pooled = paired_bootstrap([delta for deltas in pairs.values() for delta in deltas], 2000, 1).as_dict()
    return {"best": best, "differences": differences, "pooled": pooled, **cost(search, default["ppo.steps"])}


def interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of whatever has been run; records by search and objective."""
    lines = []
    for name, found in records.items():
        search, objective = name.rsplit("-", 1)
        lines += [f"## `python -m bench.tuning {search} --objective {objective}`", ""]
        if search == "bad-start":
            lines += [f"Planted: learning rates x {RATE_FACTOR}, KL coefficient x {COEFFICIENT_FACTOR}: "]
            lines += [f"`{shlex.join(as_options(found['planted']))}`.", "", "| run | gold gain |", "|---|---|"]
            lines += [*(f"| {run} | {interval(gain)} |" for run, gain in found["gains"].items()), ""]
            lines += [f"The best of the search recovers {found['recovered']:.0%} of the default's gain.", ""]
        else:
            lines += ["The winner's gold less the default's, same SFT and reward models, same prompts, same steps:", ""]
            lines += [
                "| seed | difference |",
                "|---|---|",
                *(f"| {seed} | {interval(each)} |" for seed, each in found["differences"].items()),
            ]
            lines += [f"| all | {interval(found['pooled'])} |", ""]
        lines += _search(found)
    return "\n".join(lines).rstrip() + "\n"


def _search(found: Mapping[str, Any]) -> list[str]:
    ends = ", ".join(f"{count} {end}" for end, count in found["ends"].items())
    text = (
        f"Search: {found['trials']} trials ({ends}), {found['steps']} PPO steps, as many as {found['runs']:.1f} runs of the default. Best:"
    )
    return [text, f"`{shlex.join(as_options(found['best']))}`.", ""]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", choices=("bad-start", "around"))
    parser.add_argument("--objective", choices=OBJECTIVES, default="gold", help="tune.objective of the search")
    given = parser.parse_args(arguments)
    WORK.mkdir(parents=True, exist_ok=True)
    record = {"bad-start": bad_start, "around": around}[given.search](given.objective)
    (WORK / f"{given.search}-{given.objective}.json").write_text(json.dumps(record, indent=2))
    known = {path.stem: json.loads(path.read_text()) for path in sorted(WORK.glob("*.json"))}
    print(page(known))


if __name__ == "__main__":
    main(sys.argv[1:])
