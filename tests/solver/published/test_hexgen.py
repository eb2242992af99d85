"""HexGen's mutations keep every GPU and the memory of every group; its generations never lose the best plan."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.hexgen import Individual, Mutations, evolved
from hetis.solver.published.replicas import FleetGpus
from tests.solver.instances import make_node, make_problem


def fleet(rooms: Sequence[float]) -> FleetGpus:
    """Return one card for each memory size, two to a node."""
    size = len(rooms)
    return FleetGpus(
        names=tuple(f"card{i}" for i in range(size)),
        nodes=tuple(f"node{i // 2}" for i in range(size)),
        zones=("here",) * size,
        device_class=np.zeros(size, dtype=np.int64),
        room_bytes=np.array(rooms),
    )


@given(st.lists(st.integers(1, 9), min_size=3, max_size=9), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=50)
def test_mutations_keep_all_gpus_and_the_memory_of_every_group(rooms: list[int], least: int, seed: int) -> None:
    gpus = fleet([float(room) for room in rooms])
    mutations = Mutations(gpus, float(least), random.Random(seed))
    one: Individual = (tuple(range(len(rooms))),)
    for _ in range(20):
        one = mutations.mutated(one)
        assert sorted(gpu for group in one for gpu in group) == list(range(len(rooms)))
        assert len(one) == 1 or all(gpus.room_bytes[list(group)].sum() >= least for group in one)


@pytest.mark.parametrize("of_node", [1, 2])
def test_mutations_reach_every_partition(of_node: int) -> None:
    """Four cards have 15 partitions, also if no two of them are in one node."""
    nodes = tuple(f"node{i // of_node}" for i in range(4))
    mutations = Mutations(replace(fleet([1.0] * 4), nodes=nodes), 1.0, random.Random(0))
    one: Individual = ((0, 1, 2, 3),)
    seen = set[Individual]()
    for _ in range(1000):
        one = mutations.mutated(one)
        seen.add(one)
    assert len(seen) == 15


def test_the_best_of_all_generations_survives() -> None:
    """Fitness prefers what only the first generation offers, which later ones must not replace."""
    found = iter([((1,),)] + [((0,),)] * 10_000)
    search = SimpleNamespace(budget=Budget(), tell=lambda phase, rate: None)
    best = evolved(
        ((0, 0),), lambda _: next(found), lambda one: (float(one[0][0] == 1), 0), random.Random(0), search
    )  # fmt: skip
    assert best == ((1,),)


def planned(problem: PlacementProblem, strategy: str) -> Plan | None:
    try:
        return solve_placement(problem, strategy=strategy)
    except (NoPlanFoundError, InfeasibleError):
        return None


def test_equal_cards_become_as_many_replicas_as_hexgen_proves_best() -> None:
    problem = make_problem([make_node("a", "A", gpus=4)])
    published, proven = planned(problem, "hexgen-paper"), planned(problem, "hexgen")
    assert published is not None
    assert proven is not None
    assert published.result.value == pytest.approx(proven.result.value, rel=1e-6)
