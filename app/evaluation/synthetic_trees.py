"""Sampling reports turned into conversation trees for people to rank, in Open-Assistant's export format."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.evaluation.sampling_report import Answer, Conversation, SamplingReport, pool
from app.formats.records import is_usable

STATE = "ranking"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_OID, "corral synthetic trees")
"""Ids are derived from content: the same reports give the same file, and a tree that comes back is known again."""


@dataclass(frozen=True)
class SyntheticTrees:
    """left_out: prompts that gave no tree, by reason."""

    trees: list[dict[str, Any]]
    left_out: dict[str, int]


def synthetic_trees(reports: Iterable[SamplingReport], *, max_replies: int = 5, lang: str = "en", seed: int = 0) -> SyntheticTrees:
    """One tree per prompt with at least two distinct usable answers, of which at most `max_replies` are drawn by `seed`.

    Answers are marked synthetic and name their model and sampling; earlier turns of a prompt stand above them.
    """
    trees: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for conversation, answers in pool(reports).items():
        distinct = list({answer.text.strip(): answer for answer in reversed(answers) if is_usable(answer.text)}.values())[::-1]
        if conversation[0].role == "system":
            left_out["the format has no system message"] += 1
        elif len(distinct) < 2:
            left_out["fewer than two distinct answers"] += 1
        else:
            trees.append(_tree(conversation, distinct, max_replies, lang, seed))
    return SyntheticTrees(trees, dict(left_out))


def _tree(conversation: Conversation, answers: Sequence[Answer], max_replies: int, lang: str, seed: int) -> dict[str, Any]:
    path: list[str] = []
    nodes: list[dict[str, Any]] = []
    for message in conversation:
        path.append(message.content)
        role = "prompter" if message.role == "user" else "assistant"
        nodes.append(_node(path, role, lang, parent=nodes[-1] if nodes else None, synthetic=False))
    chosen = answers
    if len(answers) > max_replies:
        chosen = random.Random(f"{seed}:{nodes[-1]['message_id']}").sample(answers, max_replies)
    for answer in chosen:
        name = ",".join([answer.model_name, *(f"{key}={value}" for key, value in answer.params.items())])
        _node([*path, answer.text.strip()], "assistant", lang, parent=nodes[-1], synthetic=True)["model_name"] = name
    return {"message_tree_id": nodes[0]["message_id"], "tree_state": STATE, "prompt": nodes[0]}


def _node(path: Sequence[str], role: str, lang: str, *, parent: Mapping[str, Any] | None, synthetic: bool) -> dict[str, Any]:
    """The message at the end of a path of texts, hung under its parent."""
    node: dict[str, Any] = {
        "message_id": str(uuid.uuid5(NAMESPACE, "\0".join(path))),
        "text": path[-1],
        "role": role,
        "lang": lang,
        "deleted": False,
        "synthetic": synthetic,
        "replies": [],
    }
    if parent is not None:
        node["parent_id"] = parent["message_id"]
        parent["replies"].append(node)
    return node
