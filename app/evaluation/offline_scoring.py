"""Scores of every reply of a data source by one or several models, into one parquet file: `corral score`.

While it works, everything lies in the folder OUTPUT.parts: the replies, a manifest of what is being done, and per model one parquet
file for every `part_rows` replies. Each appears whole or not at all, so the same call goes on from whatever moment the process
died at, and the finished file does not depend on how often that was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.config.recipe import Recipe
from app.config.serving import ModelKind
from app.data.record_store import Records
from app.durable import read_json, sync, tree_hash, write_json
from app.errors import ConfigError, Interrupted, ModelError
from app.evaluation.local_scorer import check_scorer, load_scorer, reply_encoder
from app.evaluation.progress import progress
from app.evaluation.reply_records import Reply, open_replies, read_replies, source_digest
from app.models.scoring import kind_of

KEY, WEIGHTS = b"corral.scores", b"weights_hash"
"""Metadata of the parquet file: JSON of `Job.plan`, of `Counts` and, as `weights`, of each model's weights_hash, which the scoring
service's answers carry too; and of a part: that hash alone."""
MANIFEST, REPLIES = "manifest.json", "replies.arrow"
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
ROW_COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("line", pa.int64()),
        ("id", pa.string()),
        ("reply", pa.int32()),
    ]
)
TEXT_COLUMNS = pa.schema([("messages", MESSAGES), ("text", pa.string())])
SCORES: dict[ModelKind, pa.Schema] = {
    "reward": pa.schema([("score", pa.float32()), ("tokens", pa.int32()), ("truncated", pa.bool_())]),
    "reference": pa.schema(
        [("logprob_sum", pa.float64()), ("logprob_mean", pa.float64()), ("tokens", pa.int32()), ("truncated", pa.bool_())]
    ),
}
"""tokens: of conversation and reply as the model saw them; truncated: whether some were cut. logprob_*: of the reply's tokens, its
end token among them."""


@dataclass(frozen=True)
class Job:
    """What to score. recipe: the `data` section (its path is the source), model.precision, scoring.max_batch_tokens;
    models: folder by name, a single one may have the name ""; texts: keep conversations and replies beside the scores."""

    recipe: Recipe
    models: Mapping[str, str]
    output: Path
    texts: bool = False
    every_turn: bool = False
    part_rows: int = 2048

    @property
    def work(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def quarantine(self) -> Path:
        return self.output.with_name(f"{self.output.name}.quarantine.jsonl")

    def plan(self) -> dict[str, Any]:
        """All that the scores depend on. Raises DataError, ModelError and ConfigError for what cannot be scored."""
        recipe, data = self.recipe, self.recipe.data
        for path in self.models.values():
            if not Path(path).is_dir():
                raise ModelError(f"--model {path}: no such folder; scores are told by the hash of a local folder")
            check_scorer(path, recipe, kind_of(path))
        (source,) = data.sources().values()
        return {
            "source": source_digest(source),
            "reading": source.model_dump(mode="json", exclude={"path"}) | {"every_turn": self.every_turn},
            "encoding": {"template": data.template, "max_length": data.max_length},
            "computing": {"precision": recipe.model.precision, "max_batch_tokens": recipe.scoring.max_batch_tokens},
            "file": {"texts": self.texts, "part_rows": self.part_rows},
            "models": {name: {"kind": kind_of(path), "folder_hash": tree_hash(Path(path))} for name, path in self.models.items()},
        }


DIFFERENCES = {
    "source": "the source has changed since",
    "reading": "the data.* options that say how it is read, or --every-turn, are others",
    "encoding": "data.template or data.max_length is another",
    "computing": "model.precision or scoring.max_batch_tokens is another",
    "file": "--texts or --part-rows is another",
    "models": "the models are others, or have changed since",
}


def score_replies(job: Job) -> dict[str, Any]:
    """Score what is not scored yet and write the file; returns `summary` of it. Shows progress.

    Raises DataError, ModelError and ConfigError before anything is computed: for bad input, and where the output, or what an
    interrupted call left, belongs to something else; ScoringError where a model computes NaN; Interrupted on SIGINT.
    """
    plan = job.plan()
    if job.output.exists():
        _require_same(plan, stored(job.output), job.output)
        shutil.rmtree(job.work, ignore_errors=True)  # where the process died just before it did
        return summary(job.output)
    try:
        counts = _begin(job, plan)
        replies = open_replies(job.work / REPLIES)
        records = replies.chosen(np.ones(len(replies.trees), np.bool_))
        with progress("scores", len(job.models) * len(records), _done(job, len(records))) as advance:
            for number, (name, path) in enumerate(job.models.items()):
                _score_parts(job, number, path, plan["models"][name]["kind"], records, advance)
        _assemble(job, plan, counts, records)
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped; {job.work} holds what is scored, and the same command goes on from there") from error
    shutil.rmtree(job.work)
    return summary(job.output)


def stored(file: Path) -> dict[str, Any]:
    """Plan and counts in a finished file. Raises ConfigError where it is none."""
    try:
        found = pq.read_schema(file).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{file}: is there already, and no file of `corral score`; give another --output") from error
    if KEY not in found:
        raise ConfigError(f"{file}: is there already, and no file of `corral score`; give another --output")
    plan: dict[str, Any] = json.loads(found[KEY])
    return plan


def summary(file: Path) -> dict[str, Any]:
    """Counts, and per model: kind, hashes, and of every number per reply (`score`, or `logprob_sum` and `logprob_mean`) the mean and the
    standard deviation (of the population) over all replies and by file, and how many were truncated."""
    plan = stored(file)
    table = pq.read_table(file, columns=[name for name in pq.read_schema(file).names if name not in TEXT_COLUMNS.names])
    sources = table["file"].unify_dictionaries().combine_chunks()
    places = {name: sources.indices.to_numpy() == code for code, name in enumerate(sources.dictionary.to_pylist())}
    models = {}
    for name, model in plan["models"].items():
        columns = {field: table[_column(field, name)].to_numpy() for field in SCORES[model["kind"]].names}
        tokens, truncated = columns.pop("tokens"), columns.pop("truncated")
        models[name or "model"] = {
            **model,
            "weights_hash": plan["weights"][name],
            "tokens": int(tokens.sum()),
            "truncated": int(truncated.sum()),
            **{field: _spread(values) for field, values in columns.items()},
            "files": {
                place: {"replies": int(chosen.sum()), **{field: _spread(values[chosen]) for field, values in columns.items()}}
                for place, chosen in places.items()
            },
        }
    return {"output": str(file), "source_sha256": plan["source"], **plan["counts"], "models": models}


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    values = values.astype(np.float64)
    return {"mean": float(values.mean()), "std": float(values.std())}


def _require_same(plan: Mapping[str, Any], other: Mapping[str, Any], place: Path) -> None:
    for part, reason in DIFFERENCES.items():
        if plan[part] != other.get(part):
            raise ConfigError(f"{place} holds other scores: {reason}; give another --output, or remove it")


def _begin(job: Job, plan: dict[str, Any]) -> dict[str, int]:
    """The folder of parts with its replies and manifest, as they are or new; returns the counts."""
    manifest = job.work / MANIFEST
    if manifest.is_file():
        found = read_json(manifest)
        _require_same(plan, found, job.work)
        return dict(found["counts"])
    shutil.rmtree(job.work, ignore_errors=True)
    job.work.mkdir(parents=True)
    (source,) = job.recipe.data.sources().values()
    counts = read_replies(source, job.work / REPLIES, job.quarantine, every_turn=job.every_turn, strict=job.recipe.data.strict)
    write_json(manifest, plan | {"counts": asdict(counts)})
    return asdict(counts)


def _parts(job: Job, number: int, replies: int) -> Iterator[tuple[Path, slice]]:
    """The file of each part of a model, and the replies it is for."""
    for part in range(math.ceil(replies / job.part_rows)):
        yield job.work / f"{number}-{part:06}.parquet", slice(part * job.part_rows, min(replies, (part + 1) * job.part_rows))


def _done(job: Job, replies: int) -> int:
    parts = (part for number in range(len(job.models)) for part in _parts(job, number, replies))
    return sum(rows.stop - rows.start for file, rows in parts if file.is_file())


def _score_parts(job: Job, number: int, path: str, kind: ModelKind, records: Records[Reply], advance: Callable[[int], None]) -> None:
    """The parts of a model that are not there yet; without such, the model is not loaded."""
    missing = [(file, rows) for file, rows in _parts(job, number, len(records)) if not file.is_file()]
    if not missing:
        return
    encoder, model = reply_encoder(path, job.recipe), load_scorer(path, job.recipe, kind)
    for file, rows in missing:
        replies = groupby(records[rows], key=attrgetter("messages"))
        encoded = [one for messages, same in replies for one in encoder.encode(messages, [reply.text for reply in same])]
        answers = model.answers([one.ids for one in encoded], job.recipe.scoring.max_batch_tokens, advance)
        if kind == "reward":
            numbers: list[Sequence[Any]] = [[answer[0] for answer in answers]]
        else:
            of_replies = [answer[-one.reply_tokens :].astype(np.float64) for one, answer in zip(encoded, answers, strict=True)]
            numbers = [[values.sum() for values in of_replies], [values.mean() for values in of_replies]]
        columns = [*numbers, [len(one.ids) for one in encoded], [one.truncated for one in encoded]]
        schema = SCORES[kind].with_metadata({WEIGHTS: model.weights_hash})
        _write(file, schema, [pa.table(columns, schema=schema)])


def _assemble(job: Job, plan: Mapping[str, Any], counts: Mapping[str, int], records: Records[Reply]) -> None:
    """The finished file, one row group per part."""
    fields = [*ROW_COLUMNS, *(TEXT_COLUMNS if job.texts else ())]
    weights = {}
    for number, (name, model) in enumerate(plan["models"].items()):
        first, _ = next(_parts(job, number, len(records)))
        weights[name] = pq.read_schema(first).metadata[WEIGHTS].decode()
        fields += [field.with_name(_column(field.name, name)) for field in SCORES[model["kind"]]]
    metadata = {**plan, "weights": weights, "counts": counts}
    schema = pa.schema(fields, {KEY: json.dumps(metadata)})

    def tables() -> Iterator[pa.Table]:
        for parts in zip(*(_parts(job, number, len(records)) for number in range(len(job.models))), strict=True):
            replies = list(records[parts[0][1]])
            columns = [[getattr(reply, field.name) for reply in replies] for field in ROW_COLUMNS]
            if job.texts:
                columns += [[[message.as_dict() for message in reply.messages] for reply in replies], [reply.text for reply in replies]]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, fields[: len(columns)], strict=True)]
            for file, _ in parts:
                arrays += pq.read_table(file).columns
            yield pa.table(arrays, schema=schema)

    _write(job.output, schema, tables())


def _write(file: Path, schema: pa.Schema, tables: Iterator[pa.Table] | Sequence[pa.Table]) -> None:
    temporary = file.with_name(f".{file.name}.writing")
    with pq.ParquetWriter(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table)
    sync(temporary)
    os.replace(temporary, file)
    sync(file.parent)


def _column(field: str, model: str) -> str:
    return f"{field}_{model}" if model else field
