"""Labels of Open-Assistant messages: exports map each name to {"value", "count"}, the hub's rows hold parallel lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from app.errors import DataError
from app.formats.records import Labels

LISTS = {"name", "value", "count"}


def parse_labels(message: Mapping[str, Any]) -> Labels | None:
    """The labels that training can use, and the language; None where a message has neither. Null entries are passed over.

    Raises DataError with the message and what is wrong: a language that is no text, labels of another shape, a value outside 0 to 1.
    """
    lang, who = message.get("lang"), f"message {message.get('message_id')}"
    if lang is not None and not isinstance(lang, str):
        raise DataError(f"{who}: `lang` {lang!r} is no text")
    values = {name: _checked(name, value, who) for name, value in _pairs(message.get("labels"), who) if value is not None}
    labels = Labels(lang, values.get("quality"), values.get("humor"), values.get("creativity"))
    return None if labels == Labels() else labels


def _pairs(labels: Any, who: str) -> Iterable[tuple[str, Any]]:
    """(name, value) of each label."""
    if labels is None:
        return ()
    if not isinstance(labels, Mapping):
        raise DataError(f"{who}: `labels` is no map of labels")
    if labels and set(labels) <= LISTS:
        names, values = (labels.get(key) or [] for key in ("name", "value"))
        if not isinstance(names, list) or not isinstance(values, list) or len(names) != len(values):
            raise DataError(f"{who}: `labels` has lists of names and values that do not match")
        return zip(map(str, names), values, strict=True)
    return [(str(name), _value(str(name), entry, who)) for name, entry in labels.items() if entry is not None]


def _value(name: str, entry: Any, who: str) -> Any:
    if not isinstance(entry, Mapping) or "value" not in entry:
        raise DataError(f"{who}: label {name!r} has no `value`")
    return entry["value"]


def _checked(name: str, value: Any, who: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError(f"{who}: label {name!r} is {value!r} and not between 0 and 1")
    return float(value)
