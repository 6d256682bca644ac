"""Names of the files and folders in a run folder that more than one module writes, reads or looks for."""

from __future__ import annotations

MANIFEST = "manifest.json"
"""Of a run, a stage, a checkpoint: what it is and what belongs to it, written last."""
LOCK = ".lock"
"""Held by the process that works in the run folder."""

SUMMARY_FILE = "summary.json"
EXAMPLES_FILE = "examples.jsonl"
REPORT_FILE = "report.html"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
LOG_FILE = "run.log"
"""What the run showed, with the times."""
PROGRESS_FILE = "progress.json"
"""The stage that began last, and how many steps it has."""

BASE = "base"
"""The stage that completes the base model, and in its folder the completed copy."""
SEARCH = "tune"
"""The stage whose trials have folders of their own."""

DATA = "data"
"""Of a run and of a stage: what is read again from the source of the data."""
LOGS = "logs"
CHECKPOINTS = "checkpoints"
ROLLOUTS = "rollouts"
"""Of PPO: the rollouts of the last steps."""
MODEL = "model"
"""What a stage trained."""
BEST_MODEL = f".{MODEL}.best"
"""The best model of a training so far, which becomes the stage's."""
HELD_OUT_METRICS = "held_out.json"
"""In a model folder: its held-out metrics. Of the best model so far, which has no manifest, it is the file that is sent last."""

SAVING, REPLACED = ".saving", ".replaced"
"""How names end of what is half written, and of what is about to be removed."""
