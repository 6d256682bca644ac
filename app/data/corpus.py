"""The corpus of a run: rows read as they come, malformed ones set aside, extracted, and split by conversation tree.

Records go into files under the run folder and are mapped from there, so a source may be larger than memory; what stays in
memory is a few numbers a record.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.config.data import SINGLE, DataConfig, SetConfig
from app.data import embedded
from app.data.reading import EMBEDDED, Keys, Reading, RecordFiles, read_set
from app.data.record_store import RecordTable
from app.data.registry import complete
from app.data.rows import Quarantine
from app.errors import DataError
from app.formats.records import Message, PromptItem, RankedGroup, Thread

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

LANGUAGES_NAMED = 5
QUARANTINE = "quarantine.jsonl"
EMBEDDED_FILE = "embedded.jsonl"
RECORDS = "records"


@dataclass(frozen=True)
class Split:
    """One side of the train/validation split; records of one data set stand next to each other."""

    threads: Sequence[Thread]
    groups: Sequence[RankedGroup]
    prompts: Sequence[PromptItem]

    def texts(self) -> Iterator[str]:
        """Every message text once, in order of first appearance: what a tokenizer is trained on."""
        seen: set[str] = set()
        for messages in self.conversations():
            for message in messages:
                if message.content not in seen:
                    seen.add(message.content)
                    yield message.content

    def conversations(self) -> Iterator[tuple[Message, ...]]:
        """Those of all threads, then those of all prompts."""
        yield from (thread.messages for thread in self.threads)
        yield from (prompt.messages for prompt in self.prompts)


@dataclass(frozen=True)
class Source:
    """What one data set gave. rows: lines read; counts: trees, messages, threads, groups, pairs and prompts over both splits;
    repeated: equal threads left out; quarantined: rows set aside; languages: trees by language, where the data says so;
    sha256: of the lines read; path: the embedded task's file, else as configured; settings: how it was read."""

    path: Path
    format: str
    rows: int
    counts: dict[str, int]
    languages: dict[str, int]
    repeated: int
    quarantined: int
    sha256: str
    settings: SetConfig = SetConfig()


@dataclass(frozen=True)
class Corpus:
    """Both sides of the split, and each data set by its name; pretraining: what ppo.pretraining reads beside them, where it is on."""

    train: Split
    validation: Split
    sources: dict[str, Source]
    pretraining: Corpus | None = None

    @property
    def path(self) -> str:
        """For messages: every set's path."""
        return ", ".join(str(source.path) for source in self.sources.values())

    @property
    def format(self) -> str:
        return ", ".join(dict.fromkeys(source.format for source in self.sources.values()))

    @property
    def settings(self) -> dict[str, SetConfig]:
        """How each set was read."""
        return {name: source.settings for name, source in self.sources.items()}

    def facts(self) -> dict[str, Any]:
        """For a run's manifest: the whole and, where there are several, each set."""
        whole = {"path": self.path, "format": self.format, "counts": self.counts, "quarantined": self.quarantined}
        if self.pretraining is not None:
            whole["pretraining"] = self.pretraining.facts()
        if len(self.sources) == 1:
            return whole
        sets = {name: asdict(source) for name, source in self.sources.items()}
        return whole | {"sets": {name: {**facts, "path": str(facts["path"]), "settings": None} for name, facts in sets.items()}}

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources.values())

    @property
    def quarantined(self) -> int:
        return sum(source.quarantined for source in self.sources.values())

    @property
    def counts(self) -> dict[str, int]:
        first, *others = (source.counts for source in self.sources.values())
        return {name: count + sum(other[name] for other in others) for name, count in first.items()}

    @property
    def languages(self) -> dict[str, int]:
        return dict(sum((Counter(source.languages) for source in self.sources.values()), Counter[str]()).most_common())

    @property
    def left_out(self) -> tuple[str, ...]:
        """What the choice of languages leaves out, and the option that keeps it: one line for each set that loses trees by it."""
        return tuple(line for name, source in self.sources.items() if (line := _left_out(name, source)))

    @property
    def sha256(self) -> str:
        """That of the only set, or over the names and hashes of all."""
        sets = {name: source.sha256 for name, source in self.sources.items()}
        if self.pretraining is not None:
            sets["ppo.pretraining"] = self.pretraining.sha256
        return next(iter(sets.values())) if len(sets) == 1 else hashlib.sha256(repr(sorted(sets.items())).encode()).hexdigest()


def load_corpus(config: DataConfig, *, seed: int, folder: Path, split: bool = True) -> Corpus:
    """Read every data set, extract and split; with split = False everything is in `train`.

    Writes under `folder`: the embedded task's trees (`embedded.jsonl`), rows that cannot be used (`quarantine.jsonl`, one
    {"file", "line", "reason", "text"} each) and the records. The split depends on the seed and the tree ids, not on the order of
    rows; a tree that is held out of one set is held out of all.
    Raises DataError when nothing can be read, the format is unknown, or (`data.strict`) at the first malformed row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = complete(config).sources()
    readings: dict[str, Reading] = {}
    with ExitStack() as open_files:
        quarantine = open_files.enter_context(Quarantine(folder / QUARANTINE, strict=config.strict))
        records = RecordFiles(folder / RECORDS, open_files, seed)
        if any(source.path == EMBEDDED for source in sources.values()):
            embedded.write_trees(folder / EMBEDDED_FILE, trees=config.embedded.trees, seed=seed)
        for name, source in sources.items():
            path = str(folder / EMBEDDED_FILE) if source.path == EMBEDDED else source.path
            assert path is not None, "completed above"
            readings[name] = read_set(name, source, path, records, quarantine)
    shares = [(readings[name].trees, source.val_split or 0.0) for name, source in sources.items() if split]
    held_out = np.concatenate([np.empty(0, np.uint64), *(_held_out_trees(trees, share) for trees, share in shares)])
    threads, groups, prompts = records.tables()
    limits = [source.max_val_set for source in sources.values()]

    def side(*, validation: bool) -> Split:
        chosen = [_side(table, held_out, limits if validation else [], validation, seed) for table in (threads, groups, prompts)]
        return Split(threads.chosen(chosen[0]), groups.chosen(chosen[1]), prompts.chosen(chosen[2]))

    found = {
        name: _source(number, readings[name], source, threads, groups, prompts) for number, (name, source) in enumerate(sources.items())
    }
    return Corpus(side(validation=False), side(validation=True), found)


def _held_out_trees(trees: Keys, val_split: float) -> Keys:
    """round(val_split x trees) of the sorted keys, but at least one on each side where there are two trees."""
    return trees[: min(max(round(val_split * len(trees)), 1), len(trees) - 1)]


def _side(table: RecordTable[Any], held_out: Keys, limits: Sequence[int | None], validation: bool, seed: int) -> np.ndarray[Any, Any]:
    """Which records belong to one side: bool, one entry a record. limits: the most that each data set may have there."""
    chosen: np.ndarray[Any, Any] = np.isin(table.trees, held_out) == validation
    for number, limit in enumerate(limits):
        ours = np.flatnonzero(chosen & (table.datasets == number))
        if limit is not None and len(ours) > limit:
            chosen[np.random.default_rng([seed, number]).permutation(ours)[limit:]] = False
    return chosen


def _source(
    number: int,
    reading: Reading,
    settings: SetConfig,
    threads: RecordTable[Thread],
    groups: RecordTable[RankedGroup],
    prompts: RecordTable[PromptItem],
) -> Source:
    of_set = groups.datasets == number
    counts = {
        "trees": len(reading.trees),
        "messages": reading.messages,
        "threads": int((threads.datasets == number).sum()),
        "groups": int(of_set.sum()),
        "pairs": int(groups.pairs[of_set].sum()),
        "prompts": int((prompts.datasets == number).sum()),
    }
    languages = dict(reading.languages.most_common())
    repeated = int(threads.repeated[number]) if number < len(threads.repeated) else 0
    return Source(reading.path, reading.format, reading.rows, counts, languages, repeated, reading.quarantined, reading.sha256, settings)


def _left_out(name: str, source: Source) -> str | None:
    """Only conversation trees say their language; of other formats nothing is left out."""
    kept = source.settings.lang
    if not kept or source.format != "oasst":
        return None
    others = [lang for lang in source.languages if lang not in kept]
    unnamed = source.counts["trees"] - sum(source.languages.values())
    trees = sum(source.languages[lang] for lang in others) + unnamed
    if not trees:
        return None
    wanted = [*(lang for lang in kept if lang in source.languages), *others]
    key = "data.lang" if name == SINGLE else f"data.sets.{name}.lang"
    remedy = json.dumps([] if unnamed or len(wanted) > LANGUAGES_NAMED else wanted)
    return f"{trees} {'tree' if trees == 1 else 'trees'} left out by {key} = {json.dumps(kept)}: --{key}='{remedy}' keeps them"


def require_threads(corpus: Corpus) -> None:
    """Raises DataError when SFT has nothing to train on or to evaluate with."""
    _require(corpus, "threads", "conversation that ends in an assistant turn", "SFT")


def require_groups(corpus: Corpus) -> None:
    """Raises DataError when a reward model has no ranked replies to train on or to evaluate with."""
    _require(corpus, "groups", "prompt with two or more ranked replies", "a reward model")


def require_prompts(corpus: Corpus) -> None:
    """Raises DataError when PPO has no prompts to answer or to evaluate with."""
    _require(corpus, "prompts", "prompt", "PPO")


def require_references(corpus: Corpus) -> None:
    """Raises DataError when no prompt to train on has an answer that ppo.reward.delta could compare with."""
    if not any(prompt.reference is not None for prompt in corpus.train.prompts):
        raise DataError(
            f"ppo.reward.delta: no prompt in the training split of {corpus.path} ({corpus.format} format) has a reference answer to "
            "compare with: set ppo.reward.delta = false, or take data with answers"
        )


def _require(corpus: Corpus, kind: str, thing: str, stage: str) -> None:
    remedies = "; ".join(corpus.left_out) or "check data.path, data.lang, data.top_k and data.val_split"
    for side, split in (("training", corpus.train), ("validation", corpus.validation)):
        if not getattr(split, kind):
            raise DataError(f"{corpus.path} ({corpus.format} format): no {thing} in the {side} split, and {stage} needs one; {remedies}")
