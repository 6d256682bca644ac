"""Processes on nodes: the rules of each role, on 1 to 64 GPUs and uneven nodes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import PlacementError
from app.planning.packing import NodeResources, Request, Slot, assign, gpus_needed

MACHINE = NodeResources(cpus=96, gpus=8, memory=1e12)


def ppo(learners: int, engines: int, *, colocate: bool = False, tensor_parallel: int = 1, scorer: float = 1.0) -> list[Request]:
    return [
        Request("learner", learners, 4, 1, strategy="pack"),
        Request("engine", engines, 1, tensor_parallel, shares="learner" if colocate else None),
        Request("reward", 1, 4, scorer),
        Request("reference", 1, 4, scorer),
    ]


def gpus_of(slots: tuple[Slot, ...], *roles: str) -> Counter[tuple[int, int]]:
    return Counter((slot.node, gpu) for slot in slots if slot.role in roles for gpu in slot.gpus)


def test_one_gpu_holds_everything_in_turns() -> None:
    requests = [
        Request("learner", 1, 1, 0.5, strategy="pack"),
        Request("engine", 1, 1, 0.5, shares="learner"),
        Request("reward", 1, 1, 0.25),
        Request("reference", 1, 1, 0.25),
    ]
    slots = assign(requests, [NodeResources(8, 1)])
    assert {(slot.node, slot.gpus) for slot in slots} == {(0, (0,))}


def test_a_fraction_takes_the_gpu_that_it_fills_most() -> None:
    requests = [Request("a", 1, 1, 0.5), Request("b", 1, 1, 0.7), Request("c", 1, 1, 0.3), Request("d", 1, 1, 0.5)]
    assert [slot.gpus for slot in assign(requests, [NodeResources(8, 2)])] == [(0,), (1,), (1,), (0,)]


def test_a_pair_finds_a_node_with_room_for_both() -> None:
    requests = [Request("learner", 8, 1, 1, strategy="pack"), Request("engine", 6, 1, 1, shares="learner")]
    slots = assign(requests, [NodeResources(10, 8)] * 2)
    assert Counter(slot.node for slot in slots if slot.role == "learner") == {0: 5, 1: 3}
    assert gpus_of(slots, "engine") <= gpus_of(slots, "learner")
    with pytest.raises(PlacementError, match="learner 5 of 8 needs 2 CPUs on one node"):
        assign(requests, [NodeResources(8, 8)])


FRACTIONS = st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.9]), max_size=6)


def fewest(parts: list[float], gpus: list[float]) -> int:
    """By trying everything."""
    if not parts:
        return len(gpus)
    first, *rest = parts
    places = [gpu for gpu, used in enumerate(gpus) if used + first <= 1 + 1e-6]
    beside = [fewest(rest, [used + first * (at == gpu) for at, used in enumerate(gpus)]) for gpu in places]
    return min([*beside, fewest(rest, [*gpus, first])])


@settings(max_examples=80, deadline=None)
@given(FRACTIONS)
def test_the_fewest_gpus_for_fractions(parts: list[float]) -> None:
    assert gpus_needed(parts) == fewest(parts, [])
    many = gpus_needed([*parts, *[0.5] * 20])
    assert many <= gpus_needed(parts) + 10
    try:
        slots = assign([Request(str(i), 1, 0, part) for i, part in enumerate(parts)], [NodeResources(1, 3)])
    except PlacementError:
        return
    assert gpus_needed(parts) <= len(gpus_of(slots, *map(str, range(len(parts)))))


def test_two_gpus() -> None:
    slots = assign(ppo(1, 1, colocate=True, scorer=0.5), [NodeResources(16, 2)])
    assert gpus_of(slots, "learner") == gpus_of(slots, "engine")
    assert gpus_of(slots, "reward") == gpus_of(slots, "reference") != gpus_of(slots, "learner")


def test_eight_gpus_colocated_as_open_assistant_did() -> None:
    slots = assign(ppo(6, 6, colocate=True), [MACHINE])
    assert gpus_of(slots, "learner") == gpus_of(slots, "engine") == Counter({(0, gpu): 1 for gpu in range(6)})
    assert sorted(gpus_of(slots, "reward", "reference")) == [(0, 6), (0, 7)]


def test_sixteen_gpus_learners_on_one_node_engines_where_room_is() -> None:
    slots = assign(ppo(8, 6), [MACHINE] * 2)
    assert {slot.node for slot in slots if slot.role == "learner"} == {0}
    assert {slot.node for slot in slots if slot.role == "engine"} == {1}
    assert max(gpus_of(slots, "learner", "engine", "reward", "reference").values()) == 1


def test_sixty_four_gpus_learners_packed_engines_spread() -> None:
    slots = assign(ppo(16, 12, tensor_parallel=2), [MACHINE] * 8)
    assert len({slot.node for slot in slots if slot.role == "learner"}) == 2
    engines = Counter(slot.node for slot in slots if slot.role == "engine")
    assert max(engines.values()) - min(engines.values()) <= 1
    assert all(len(slot.gpus) == 2 for slot in slots if slot.role == "engine")
    assert max(gpus_of(slots, "learner", "engine", "reward", "reference").values()) == 1


def test_uneven_nodes() -> None:
    nodes = [NodeResources(16), NodeResources(32, 2), NodeResources(96, 8), NodeResources(48, 4)]
    slots = assign(ppo(8, 1, tensor_parallel=4), nodes)
    assert {slot.node for slot in slots if slot.role == "learner"} == {2}
    assert [slot.node for slot in slots if slot.role == "engine"] == [3]
    assert {slot.node for slot in slots if slot.role in ("reward", "reference")} == {1}


def test_a_large_engine_gets_a_whole_node_where_the_learners_would_break_it() -> None:
    requests = [Request("learner", 10, 1, 1, strategy="pack"), Request("engine", 1, 1, 8)]
    slots = assign(requests, [MACHINE, MACHINE, NodeResources(48, 4)])
    assert len({slot.node for slot in slots if slot.role == "learner"}) == 2


def test_a_large_process_without_gpus_gets_the_node_that_alone_has_room() -> None:
    requests = [Request("learner", 2, 1, strategy="pack"), Request("engine", 1, 4)]
    slots = assign(requests, [NodeResources(4), NodeResources(2)])
    assert [(slot.role, slot.node) for slot in slots] == [("learner", 1), ("learner", 1), ("engine", 0)]


def test_an_engine_never_spans_nodes() -> None:
    with pytest.raises(PlacementError, match=r"stage ppo: engine 1 of 1 needs 8 GPUs on one node.*node 0: 4 whole GPUs; node 1: 4 whole"):
        assign([Request("engine", 1, 1, 8)], [NodeResources(96, 4)] * 2, "ppo")


def test_a_fraction_never_shares_with_a_whole_process() -> None:
    with pytest.raises(PlacementError, match=r"reward 1 of 1 needs 0.5 GPU on"):
        assign([Request("learner", 2, 1, 1), Request("reward", 1, 1, 0.5)], [NodeResources(8, 2)])


def test_the_shortage_is_what_the_nearest_node_lacks() -> None:
    nodes = [NodeResources(2, 0), NodeResources(2, 8, 2**30)]
    with pytest.raises(PlacementError, match=r"needs 4 CPUs on one node.*node 1: 2 CPUs"):
        assign([Request("learner", 1, 4, 1)], nodes)
    with pytest.raises(PlacementError, match=r"needs 2 GiB of memory on one node.*node 1: 1 GiB"):
        assign([Request("learner", 1, 1, 1, memory=2 * 2**30)], nodes)
    with pytest.raises(PlacementError, match="no node"):
        assign([Request("learner", 1, 1)], [])


def test_labels_choose_the_nodes() -> None:
    nodes = [NodeResources(96, 8, labels={"market-type": "on-demand"}), NodeResources(96, 8, labels={"market-type": "spot", "zone": "a"})]
    engine = Request("engine", 8, 1, 1, labels={"market-type": "spot"})
    assert {slot.node for slot in assign([Request("learner", 2, 1, 1), engine], nodes) if slot.role == "engine"} == {1}
    with pytest.raises(PlacementError, match=r"needs a node with market-type=spot.*node 0: market-type=on-demand; node 1: no label"):
        assign([engine], [nodes[0], NodeResources(96, 8)])


def test_long_clusters_are_cut_short() -> None:
    with pytest.raises(PlacementError, match="and 12 nodes more"):
        assign([Request("engine", 1, 1, 16)], [MACHINE] * 20)


NODES = st.lists(st.builds(NodeResources, cpus=st.integers(0, 16), gpus=st.integers(0, 8)), max_size=6)
REQUESTS = st.lists(
    st.builds(
        Request,
        role=st.sampled_from(["a", "b", "c", "d"]),
        count=st.integers(1, 6),
        cpus=st.sampled_from([0.25, 1, 2]),
        gpus=st.sampled_from([0, 0.25, 0.5, 1, 2]),
        strategy=st.sampled_from(["pack", "spread"]),
    ),
    unique_by=lambda request: request.role,
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(REQUESTS, NODES)
def test_nothing_is_given_twice(requests: list[Request], nodes: list[NodeResources]) -> None:
    try:
        slots = assign(requests, nodes)
    except PlacementError:
        return
    by_role = {request.role: request for request in requests}
    cpus, shares = Counter[int](), Counter[tuple[int, int]]()
    for slot in slots:
        request = by_role[slot.role]
        cpus[slot.node] += request.cpus  # type: ignore[assignment]
        assert len(slot.gpus) == -(-request.gpus // 1)
        for gpu in slot.gpus:
            assert gpu < nodes[slot.node].gpus
            shares[slot.node, gpu] += min(1, request.gpus)  # type: ignore[assignment]
    assert all(used <= nodes[node].cpus + 1e-6 for node, used in cpus.items())
    assert all(share <= 1 + 1e-6 for share in shares.values())
    assert Counter(slot.role for slot in slots) == {request.role: request.count for request in requests}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=8), st.integers(0, 64))
def test_single_gpu_processes_fit_exactly_when_there_are_enough(gpus: list[int], wanted: int) -> None:
    nodes = [NodeResources(100, count) for count in gpus]
    if wanted <= sum(gpus):
        assert len(assign([Request("learner", wanted, 1, 1, strategy="pack")], nodes)) == wanted
    else:
        with pytest.raises(PlacementError):
            assign([Request("learner", wanted, 1, 1, strategy="pack")], nodes)
