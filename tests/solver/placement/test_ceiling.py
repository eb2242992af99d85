"""Ceilings: no replica found by searching every stage option lies above them, and none is lost by relying on them."""

from __future__ import annotations

from operator import itemgetter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measuring.instances import example, problem
from hetis.solver.placement.ceiling import Ceiling, all_lines, ceilings, limits_of, queries_of
from hetis.solver.placement.pricing import best_replica
from hetis.solver.placement.stage_cost import kept_of_groups, layers_in_room, layers_on_card, roomiest_split
from hetis.solver.placement.tables import CostTables, FloatArray
from hetis.solver.placement.tabulation import build_cost_tables
from hetis.solver.placement.template import Configuration, configurations
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import problems

TOLERANCE = 2e-4
EXAMPLES = max(5, settings().max_examples // 2)
UNKNOWN = Ceiling(np.inf, 0.0, 0.0)


def ceiling_of(
    costs: CostTables, c: Configuration, group_price: FloatArray, card_price: FloatArray, enough: float
) -> Ceiling:
    family, t = costs.problem.family, costs.scopes[c.scope].tables
    limits = limits_of(t, c.mix, c.in_flight_index, *c.regime, c.max_copies, c.unevenness, t.t_floor)
    asked = queries_of(np.array([c.mix]), np.array([c.in_flight_index]), [limits])
    lines, begins = all_lines(t, asked, family.max_copies, family.max_pool)
    found = ceilings(t.num_layers, asked, lines, begins, group_price, card_price, np.array([enough]))
    return Ceiling(*map(float, found[0]))


def searched(
    costs: CostTables, c: Configuration, group_price: FloatArray, card_price: FloatArray, proof: Ceiling, floor: float
) -> float:
    """Return the best ``rate / price`` of a configuration, ignoring scarcity as the ceiling does."""
    tables, family = costs.scopes[c.scope].tables, costs.problem.family
    limits = limits_of(tables, c.mix, c.in_flight_index, *c.regime, c.max_copies, c.unevenness, tables.t_floor)
    if limits.shortest_s > limits.longest_s:
        return 0.0
    plenty = np.zeros(len(costs.classes), dtype=np.bool_)
    return float(
        best_replica(
            tables, c.mix, c.in_flight_index, family.max_copies, family.max_pool, group_price, card_price, plenty,
            limits, proof, floor, TOLERANCE,
        )[0]
    )  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(problem=problems(), data=st.data())
def test_no_replica_is_above_its_ceiling_and_none_is_lost(problem: PlacementProblem, data: st.DataObject) -> None:
    costs = build_cost_tables(problem)
    if not costs.ranks:
        return
    worth = data.draw(
        st.lists(st.sampled_from((1e-5, 0.1, 1.0, 3.0)), min_size=len(costs.classes), max_size=len(costs.classes))
    )
    rows = np.array([worth[g] if p == 1 else 0.0 for g, p in costs.resources.rows])
    prices = costs.group_use @ rows, costs.card_use @ rows
    for c in configurations(costs):
        ratio = searched(costs, c, *prices, UNKNOWN, 0.0)
        highest = ceiling_of(costs, c, *prices, 0.0)
        assert ratio <= highest.ratio * (1 + 1e-9)
        if ratio == 0.0:
            continue
        floor = 0.98 * ratio
        proof = ceiling_of(costs, c, *prices, floor)
        assert proof.ratio > floor, "proved too low"
        again = searched(costs, c, *prices, proof, floor)
        assert again == pytest.approx(ratio, rel=2 * TOLERANCE), "a useful option was left out"


@given(
    room=st.floats(1e8, 1e11), layer=st.floats(1e7, 5e9), card=st.floats(1e8, 5e10), groups=st.integers(1, 16),
    tp=st.integers(1, 8), cards=st.integers(1, 16), requests=st.integers(1, 256), tokens=st.floats(1.0, 1e6),
    prompts=st.floats(0.0, 1.0),
)  # fmt: skip
def test_no_split_has_more_room_than_the_roomiest(
    room: float, layer: float, card: float, groups: int, tp: int, cards: int, requests: int, tokens: float,
    prompts: float,
) -> None:  # fmt: skip
    """``prompts``: the share of tokens whose KV stays on the rank in any case."""
    kv_group_bytes, most_layers = 512.0, 96
    kv, prompt_kv = tokens * kv_group_bytes, prompts * tokens * kv_group_bytes
    most = roomiest_split(room, layer, groups, tp, cards * card, kv, prompt_kv, most_layers)
    for k in range(1, groups + 1):
        on_rank = layers_in_room(room, layer, kept_of_groups(groups, k, kv, prompt_kv), 0, most_layers)
        on_card = layers_on_card(card, kv_group_bytes, tp, k, cards, requests, tokens)
        assert int(min(on_rank, on_card)) <= most


def test_most_configurations_end_at_their_ceiling() -> None:
    """Without ceilings, pricing would search 1,824 configurations one by one."""
    costs = build_cost_tables(problem(example("fleet-160")))
    worth = np.array([2.0, 0.9, 0.4, 0.35, 0.5])
    prices = costs.group_use @ worth, costs.card_use @ worth
    some = list(configurations(costs))[::5]
    every = sorted(((ceiling_of(costs, c, *prices, 0.0).ratio, c) for c in some), key=itemgetter(0))
    best = max(searched(costs, c, *prices, UNKNOWN, 0.0) for _, c in every[-20:])
    assert sum(highest > best for highest, _ in every) < len(every) / 4
