"""summary.json in words and numbers that a newcomer understands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.display import duration

STAGES = {
    "sft": "Supervised fine-tuning",
    "rm": "Reward model",
    "ppo": "PPO",
    "evaluate": "Evaluation",
    "evaluation": "Evaluation",
    "tune": "Hyperparameter search",
}


@dataclass(frozen=True)
class Row:
    """A line of the comparison table, as texts."""

    label: str
    before: str
    after: str
    change: str
    meaning: str


def stage_title(name: str) -> str:
    """A stage's name in words."""
    return STAGES.get(name) or name.replace("_", " ").capitalize()


def look_up(summary: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or None."""
    value: Any = summary
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def number(value: float | Mapping[str, float] | None, *, percent: bool = False, signed: bool = False, digits: int | None = None) -> str:
    """A number for people; of an interval its mean. Empty for None. `digits` behind the point follow from the size by default."""
    value = value.get("mean") if isinstance(value, Mapping) else value
    if value is None:
        return ""
    if percent:
        text = f"{100 * abs(value):.1f}%"
    elif digits is not None:
        text = f"{abs(value):,.{digits}f}"
    elif value == 0:
        return "0"
    elif abs(value) < 1e-3 or abs(value) >= 1e6:
        text = f"{abs(value):.1e}"
    else:
        text = f"{abs(value):,.{0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3}f}"
    return ("−" if value < 0 else "+" if signed else "") + text


def interval_text(value: Any, *, percent: bool = False, digits: int | None = None) -> str:
    """`0.27 to 0.35`; empty where there is no interval."""
    if not isinstance(value, Mapping) or value.get("low") is None or value.get("high") is None:
        return ""
    return " to ".join(number(value[end], percent=percent, digits=digits) for end in ("low", "high"))


def cards(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """One sentence and one large number per stage that the summary knows."""

    def get(key: str) -> Any:
        return look_up(summary, key)

    found = []
    if get("sft.eval_loss_after") is not None:
        found.append(
            {
                "stage": STAGES["sft"],
                "value": f"{number(get('sft.eval_loss_before'))} → {number(get('sft.eval_loss_after'))}",
                "label": "loss on held-out conversations",
                "text": "How much the assistant's part of unseen conversations surprises the model. Lower is better.",
            }
        )
    if get("rm.pair_accuracy") is not None:
        found.append(
            {
                "stage": STAGES["rm"],
                "value": number(get("rm.pair_accuracy"), percent=True),
                "label": "of held-out pairs ordered as ranked",
                "text": f"Going by answer length alone gets {number(get('rm.length_baseline'), percent=True)} right; a coin gets half.",
            }
        )
    if get("ppo.win_rate") is not None:
        judge = look_up(summary, "ppo.win_rate_judge") or "the judge"
        found.append(
            {
                "stage": STAGES["ppo"],
                "value": number(get("ppo.win_rate"), percent=True),
                "label": f"of answers beat the fine-tuned model's (judged by {judge})",
                "text": f"95% interval {interval_text(get('ppo.win_rate'), percent=True)}. Half would mean no change; ties count half.",
            }
        )
    return found


def comparison(summary: Mapping[str, Any]) -> list[Row]:
    """Before and after PPO, on the same held-out prompts with the same seeds."""
    measures = [
        ("Reward-model score", "reward", 3, "What PPO was trained to raise, alone or with the other parts of its reward."),
        ("Gold score", "gold", 3, "The task's own judge, which no training step ever saw."),
        ("Answer length, tokens", "length", 1, "Longer answers are an easy way to please a reward model."),
        ("Distinct answers", "distinct", None, "The share of different texts. A fall means that the model repeats itself."),
    ]
    rows = []
    for label, key, digits, meaning in measures:
        before, after, gain = (look_up(summary, f"ppo.{key}_{part}") for part in ("before", "after", "gain"))
        if before is None or after is None:
            continue
        percent = digits is None
        change = number(_mean(after) - _mean(before) if gain is None else gain, percent=percent, signed=True, digits=digits)
        change = change.replace("%", " points")
        if within := interval_text(gain, percent=percent, digits=digits):
            change += f" ({within})"
        first, second = (number(side, percent=percent, digits=digits) for side in (before, after))
        rows.append(Row(label, first, second, change, meaning))
    return rows


def _mean(value: float | Mapping[str, float]) -> float:
    return value["mean"] if isinstance(value, Mapping) else value


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and meaning of what else a reader wants to know."""
    memory = summary.get("peak_memory")
    found = [
        ("KL to the fine-tuned model", number(look_up(summary, "ppo.kl")), "nats per answer: how far PPO moved the policy"),
        ("PPO steps", _count(look_up(summary, "ppo.steps")), "batches of answers sampled, scored and learnt from"),
        ("Speed", number(look_up(summary, "ppo.tokens_per_second")), "answer tokens per second, whole PPO steps"),
        (
            "Engine against learner",
            number(look_up(summary, "ppo.max_logprob_mismatch")),
            "largest difference of their log-probabilities, nats",
        ),
        ("Held-out prompts", _count(look_up(summary, "ppo.eval_prompts")), "answered by both models"),
        ("Peak memory", "" if memory is None else f"{memory / 2**30:.2f} GiB", "all processes of the run together"),
    ]
    return [fact for fact in found if fact[1]]


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def stage_seconds(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, duration and share (percent of the longest) per stage."""
    seconds = {stage: value for stage, value in (summary.get("seconds") or {}).items() if value is not None}
    longest = max(seconds.values(), default=0) or 1
    return [
        {"stage": stage_title(stage), "time": duration(value), "share": round(100 * value / longest, 1)} for stage, value in seconds.items()
    ]
