"""A generated worst reply, and short conversations joined into longer ones."""

from __future__ import annotations

from app.data.reshaping import chain_threads, with_worst_reply
from app.formats.records import Message, RankedGroup, Thread


def group(name: str, *augmented: str) -> RankedGroup:
    return RankedGroup(name, name, (Message("user", "Why?"),), ("a", "b"), augmented=augmented)


def thread(name: str, size: int = 8, system: str = "") -> Thread:
    lead = (Message("system", system),) if system else ()
    return Thread(name, name, (*lead, Message("user", "q" * (size // 2)), Message("assistant", name.rjust(size - size // 2))))


def test_worst_reply_is_drawn_by_seed_and_id() -> None:
    drawn = {(seed, name): with_worst_reply(group(name, "x", "y", "z"), seed) for seed in range(4) for name in "abcdefgh"}
    assert {item.replies[:-1] for item in drawn.values()} == {("a", "b")}
    assert {item.replies[-1] for item in drawn.values()} == {"x", "y", "z"}
    assert all(item == with_worst_reply(group(name, "x", "y", "z"), seed) for (seed, name), item in drawn.items())
    assert len({tuple(drawn[seed, name].replies[-1] for name in "abcdefgh") for seed in range(4)}) > 1


def test_worst_reply_is_a_new_one() -> None:
    assert with_worst_reply(group("g"), 1) == group("g")
    assert with_worst_reply(group("g", "a"), 1) == group("g", "a")
    assert with_worst_reply(group("g", "a", "x"), 1).replies == ("a", "b", "x")


def test_chains_are_long_enough_and_lose_nothing() -> None:
    threads = [thread(str(number)) for number in range(50)]
    chains = list(chain_threads(threads, 20, seed=1, window=8))
    lengths = [sum(len(message.content) for message in chain.messages) for chain in chains]
    assert lengths == [24] * 16 + [16]
    answers = [message.content for chain in chains for message in chain.messages if message.role == "assistant"]
    assert sorted(answers) == sorted(thread.messages[-1].content for thread in threads)
    assert all([m.role for m in chain.messages] == ["user", "assistant"] * (len(chain.messages) // 2) for chain in chains)
    assert answers != [thread.messages[-1].content for thread in threads]
    assert chains == list(chain_threads(threads, 20, seed=1, window=8))
    assert chains != list(chain_threads(threads, 20, seed=2, window=8))
    assert {chain.id for chain in chains} <= {thread.id for thread in threads}


def test_long_threads_and_no_minimum() -> None:
    threads = [thread("a", 30), thread("b", 40)]
    assert sorted(chain_threads(threads, 20, seed=1), key=lambda item: item.id) == threads
    assert list(chain_threads(threads, 0, seed=1)) == threads


def test_only_threads_under_the_same_system_message_are_joined() -> None:
    threads = [
        thread(str(number), system=system) for number, system in enumerate(["", "Be brief.", "", "Be kind.", "Be brief.", "Be brief."])
    ]
    chains = list(chain_threads(threads, 25, seed=1))
    roles = sorted("".join(message.role[0] for message in chain.messages) for chain in chains)
    assert roles == ["sua", "sua", "suaua", "uaua"]
    assert sum(len(chain.messages) for chain in chains if chain.messages[0].content == "Be kind.") == 3
