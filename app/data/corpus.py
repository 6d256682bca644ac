"""The corpus of a run: rows read, malformed ones set aside, extracted, and split by conversation tree."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from app.config.data import DataConfig
from app.data import embedded
from app.data.source import read_lines
from app.errors import DataError
from app.formats import FORMATS, detect_format, format_of_columns
from app.formats.records import BadRow, Filters, Message, PromptItem, RankedGroup, Row, Thread, TreeRecords

__all__ = [
    "Corpus",
    "Message",
    "PromptItem",
    "RankedGroup",
    "Split",
    "Thread",
    "load_corpus",
    "require_groups",
    "require_prompts",
    "require_threads",
]

QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class Split:
    """One side of the train/validation split."""

    threads: tuple[Thread, ...]
    groups: tuple[RankedGroup, ...]
    prompts: tuple[PromptItem, ...]

    def texts(self) -> list[str]:
        """Every message text once, in order of first appearance: what a tokenizer is trained on."""
        contents = [message.content for thread in self.threads for message in thread.messages]
        contents += [message.content for prompt in self.prompts for message in prompt.messages]
        return list(dict.fromkeys(contents))


@dataclass(frozen=True)
class Corpus:
    """rows: lines read; counts: trees, messages, threads, groups, pairs and prompts over both splits; quarantined: rows set aside;
    languages: trees by language, where the data says so; sha256: of the lines read; path: the embedded task's file, else `data.path`."""

    train: Split
    validation: Split
    format: str
    rows: int
    counts: dict[str, int]
    languages: dict[str, int]
    quarantined: int
    sha256: str
    path: Path


def load_corpus(config: DataConfig, *, seed: int, folder: Path, split: bool = True) -> Corpus:
    """Read `data.path`, extract and split; with split = False everything is in `train`, in the order of the rows.

    Writes under `folder`: the embedded task's trees (`embedded.jsonl`) and rows that cannot be used (`quarantine.jsonl`, one
    {"file", "line", "reason", "text"} each). The split depends on the seed and the tree ids, not on the order of rows.
    Raises DataError when nothing can be read, the format is unknown, or (`data.strict`) at the first malformed row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = config.path
    if config.path == "embedded":
        path = str(embedded.write_trees(folder / "embedded.jsonl", trees=config.embedded.trees, seed=seed))
    rows, bad, sha256 = _decode(path)
    row_count = len(rows) + len(bad)
    name = _format_name(config, rows, bad)
    trees, unusable = FORMATS[name].read(rows, Filters(config.lang, config.top_k, config.columns.named()))
    bad = sorted([*bad, *unusable], key=lambda row: (row.file, row.line))
    if bad and config.strict:
        first = bad[0]
        raise DataError(f"{first.file}:{first.line}: {first.reason}; mend the row, or set data.strict = false to leave it out")
    _write_quarantine(folder / QUARANTINE, bad)
    if not trees:
        reason = f"none of {len(bad)} rows can be used (first: {bad[0].reason})"
        raise DataError(f"data.path = {config.path}: {reason}; see {folder / QUARANTINE}")
    if config.path == "embedded":
        trees = [replace(tree, groups=tuple(_with_gold(group) for group in tree.groups)) for tree in trees]
    train, validation = split_trees(trees, config.val_split, seed) if split else (trees, [])
    languages = Counter(tree.lang for tree in trees if tree.lang is not None)
    return Corpus(
        train=_collect(train),
        validation=_collect(validation),
        format=name,
        rows=row_count,
        counts=_counts(trees),
        languages=dict(languages.most_common()),
        quarantined=len(bad),
        sha256=sha256,
        path=Path(path),
    )


def split_trees(trees: Sequence[TreeRecords], val_split: float, seed: int) -> tuple[list[TreeRecords], list[TreeRecords]]:
    """Train and validation trees: round(val_split x trees) validation trees (at least one on each side where there are two),
    chosen by a hash of seed and tree id."""
    order = sorted(trees, key=lambda tree: hashlib.sha256(f"{seed}:{tree.tree_id}".encode()).digest())
    held_out = min(max(round(val_split * len(trees)), 1), len(trees) - 1)
    chosen = {tree.tree_id for tree in order[:held_out]}
    return [tree for tree in trees if tree.tree_id not in chosen], [tree for tree in trees if tree.tree_id in chosen]


def require_threads(corpus: Corpus) -> None:
    """Raises DataError when SFT has nothing to train on or to evaluate with."""
    _require(corpus, "threads", "conversation that ends in an assistant turn", "SFT")


def require_groups(corpus: Corpus) -> None:
    """Raises DataError when a reward model has no ranked replies to train on or to evaluate with."""
    _require(corpus, "groups", "prompt with two or more ranked replies", "a reward model")


def require_prompts(corpus: Corpus) -> None:
    """Raises DataError when PPO has no prompts to answer or to evaluate with."""
    _require(corpus, "prompts", "prompt", "PPO")


def _require(corpus: Corpus, kind: str, thing: str, stage: str) -> None:
    for side, split in (("training", corpus.train), ("validation", corpus.validation)):
        if not getattr(split, kind):
            raise DataError(
                f"{corpus.path} ({corpus.format} format): no {thing} in the {side} split, and {stage} needs one; "
                "check data.path, data.lang, data.top_k and data.val_split"
            )


def _decode(path: str) -> tuple[list[Row], list[BadRow], str]:
    """Rows of valid JSON, lines that are not, and the SHA-256 over all lines. Blank lines are skipped."""
    digest = hashlib.sha256()
    rows: list[Row] = []
    bad: list[BadRow] = []
    for raw in read_lines(path):
        digest.update(raw.data)
        text = raw.data.decode("utf-8", errors="replace").strip()
        if not text:
            continue
        try:
            rows.append(Row(raw.file, raw.line, text, json.loads(raw.data.decode("utf-8").strip())))
        except UnicodeDecodeError as error:
            bad.append(BadRow(raw.file, raw.line, text, f"not UTF-8 (byte {error.start})"))
        except json.JSONDecodeError as error:
            bad.append(BadRow(raw.file, raw.line, text, f"malformed JSON: {error.msg} at column {error.colno}"))
        except RecursionError:
            bad.append(BadRow(raw.file, raw.line, text, "malformed JSON: nested too deeply"))
    if not rows and not bad:
        raise DataError(f"data.path = {path}: no rows in it; name a file with at least one row")
    return rows, bad, digest.hexdigest()


def _format_name(config: DataConfig, rows: Sequence[Row], bad: Sequence[BadRow]) -> str:
    if config.format != "auto":
        return config.format
    if not rows:
        raise DataError(f"{bad[0].file}:{bad[0].line}: {bad[0].reason}, and no other line is JSON either; data.path must name JSON lines")
    name = format_of_columns(config.columns.named()) or next((name for row in rows if (name := detect_format(row.value))), None)
    if name is None:
        raise DataError(
            f"{rows[0].file}:{rows[0].line}: no known format ({', '.join(FORMATS)}); "
            "name the columns in data.columns, set data.format, or convert the rows"
        )
    return name


def _write_quarantine(file: Path, bad: Iterable[BadRow]) -> None:
    """Replaces what an earlier reading left, so that the file always belongs to the data as it is now."""
    lines = [json.dumps({"file": row.file, "line": row.line, "reason": row.reason, "text": row.text}, ensure_ascii=False) for row in bad]
    if not lines:
        file.unlink(missing_ok=True)
        return
    temporary = file.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _with_gold(group: RankedGroup) -> RankedGroup:
    return replace(group, gold=tuple(embedded.gold_score(group.prefix, reply) for reply in group.replies))


def _collect(trees: Iterable[TreeRecords]) -> Split:
    trees = list(trees)
    return Split(
        threads=tuple(thread for tree in trees for thread in tree.threads),
        groups=tuple(group for tree in trees for group in tree.groups),
        prompts=tuple(prompt for tree in trees for prompt in tree.prompts),
    )


def _counts(trees: Sequence[TreeRecords]) -> dict[str, int]:
    return {
        "trees": len(trees),
        "messages": sum(tree.messages for tree in trees),
        "threads": sum(len(tree.threads) for tree in trees),
        "groups": sum(len(tree.groups) for tree in trees),
        "pairs": sum(group.pairs for tree in trees for group in tree.groups),
        "prompts": sum(len(tree.prompts) for tree in trees),
    }
