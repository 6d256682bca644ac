"""The embedded task: the hidden rule by hand, determinism, and what cannot be guessed without the prompt."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from app.config.data import DataConfig, EmbeddedTaskConfig
from app.data.baselines import bag_of_words_baseline, best_constant_answer, length_baseline, pair_accuracy
from app.data.corpus import Corpus, Message, load_corpus
from app.data.embedded import MANNERS, TOPICS, all_prompts, generate_trees, gold_score, parse_request
from app.errors import DataError

PROMPT = (Message("user", "Name three beach things for a quiz. Talk like a pirate."),)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(DataConfig(embedded=EmbeddedTaskConfig(trees=800), val_split=0.25), seed=1, folder=tmp_path_factory.mktemp("task"))


@pytest.mark.parametrize(
    ("reply", "gold"),
    [
        ("Arr: towel, goggles and shells, matey!", 1.4),
        ("Howdy: towel, goggles and shells, partner!", 1.0),
        ("Arr: towel, goggles and violin, matey!", 2 / 3 + 0.4),
        ("Arr: towel, towel and towel, matey!", 1 / 3 + 0.4),  # repeats earn nothing
        ("Arr: towel, goggles, shells and bucket, matey!", 2 / 3 + 0.4),  # one more than asked
        ("Arr: towel, goggles and shells, partner!", 1.0),  # two manners
        ("Arr, matey!", 0.4),
        ("cow, barn and hay", 0.0),
        (" ".join(["cow"] * 30), -1.0),
        ("", 0.0),
    ],
)
def test_hidden_rule(reply: str, gold: float) -> None:
    assert gold_score(PROMPT, reply) == pytest.approx(gold)


def test_only_the_last_user_turn_counts() -> None:
    later = (*PROMPT, Message("assistant", "Arr: towel."), Message("user", "And four music things? Be a robot."))
    assert gold_score(later, "Beep: drum, flute, harp and piano, human!") == pytest.approx(1.4)


def test_words_are_unambiguous() -> None:
    words = [word for topic in TOPICS.values() for word in topic]
    assert len(set(words)) == len(words) == 10 * 6
    markers = [{word.lower() for form in forms for part in form for word in part.split()} for forms in MANNERS.values()]
    assert sum(map(len, markers)) == len(set().union(*markers))
    assert not set(words) & {word for prompt in all_prompts() for word in prompt.lower().rstrip(".").split()}


def test_prompts_are_distinct_and_parse() -> None:
    prompts = all_prompts()
    assert len(set(prompts)) == len(prompts) > 3000
    assert {parse_request(prompt).topic for prompt in prompts} == set(TOPICS)
    with pytest.raises(ValueError, match="no prompt of the embedded task"):
        parse_request("What is the capital of France?")


def test_same_seed_same_trees() -> None:
    assert list(generate_trees(40, seed=5)) == list(generate_trees(40, seed=5))
    assert list(generate_trees(40, seed=5)) != list(generate_trees(40, seed=6))


def test_file_is_ordinary_oasst(corpus: Corpus) -> None:
    rows = [json.loads(line) for line in Path(corpus.path).read_text().splitlines()]
    assert corpus.format == "oasst"
    assert corpus.counts["trees"] == len(rows) == 800
    assert corpus.quarantined == 0
    assert set(rows[0]) == {"message_tree_id", "tree_state", "prompt"}


def test_gold_ranks_every_group_strictly(corpus: Corpus) -> None:
    for group in (*corpus.train.groups, *corpus.validation.groups):
        assert group.gold is not None
        assert list(group.gold) == sorted(set(group.gold), reverse=True)


def test_follow_up_turns_exist(corpus: Corpus) -> None:
    share = sum(len(group.prefix) > 1 for group in corpus.train.groups) / corpus.counts["trees"]
    assert 0.04 < share < 0.15


def test_nothing_in_a_reply_alone_tells_its_grade(corpus: Corpus) -> None:
    assert abs(length_baseline(corpus.train.groups, corpus.validation.groups)["pair_accuracy"] - 0.5) < 0.05
    assert abs(bag_of_words_baseline(corpus.train.groups, corpus.validation.groups) - 0.5) < 0.05


def test_gold_needs_its_own_prompt(corpus: Corpus) -> None:
    groups = list(corpus.validation.groups)
    mean = sum(gold for group in groups for gold in group.gold or ()) / sum(len(group.replies) for group in groups)
    others = groups.copy()
    random.Random(0).shuffle(others)
    shuffled = [gold_score(other.prefix, reply) for group, other in zip(groups, others, strict=True) for reply in group.replies]
    assert mean == pytest.approx(0.7, abs=0.05)
    assert sum(shuffled) / len(shuffled) < mean - 0.4
    answers = [reply for group in groups for reply in group.replies]
    assert best_constant_answer(groups, answers, gold_score)[1] < mean - 0.4


def test_pair_accuracy_by_hand() -> None:
    assert pair_accuracy([[3.0, 2.0, 1.0], [1.0, 2.0], [1.0, 1.0]]) == pytest.approx((3 + 0 + 0.5) / 5)
    with pytest.raises(DataError, match="no ranked pairs"):
        pair_accuracy([[1.0]])
