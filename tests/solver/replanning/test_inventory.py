"""The rows of the inventory admit exactly what fits in the nodes, and names are found for all that they admit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetis.solver.errors import UnboundPlanError
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import Template, TemplateStage
from hetis.solver.plan import Role
from hetis.solver.replanning.change import Fate
from hetis.solver.replanning.naming import name_gpus
from hetis.solver.replanning.net_master import ColumnList, InventoryRows, Row, inventory_of
from hetis.solver.replanning.running import Candidate, new_replica, places_of
from tests.solver.instances import SMALL_FAMILY, make_model, make_node, make_problem

PROBLEM = make_problem(
    [make_node("n", "A", gpus=6, nodes=2)],
    model=make_model(kv_heads=4),
    family=replace(SMALL_FAMILY, roles=(Role.UNIFIED,)),
)
COSTS = build_cost_tables(PROBLEM)
PLACES = places_of(PROBLEM.cluster, COSTS)
RANK = {tp: rank for rank, (_, tp) in enumerate(COSTS.ranks)}


def template(tp: int) -> Template:
    return Template(0, 0, 0, (TemplateStage(RANK[tp], PROBLEM.model.num_layers),), 1.0)


def option(old: int, devices: tuple[str, ...]) -> Candidate:
    return Candidate(
        old=old, fate=Fate.KEPT, template=template(len(devices)), groups=(devices,), workers=((),), start_s=0.0
    )


@st.composite
def named_groups(draw: st.DrawFn) -> list[Candidate]:
    """Running replicas of one TP group each, anywhere in the two nodes."""
    free = {node: [f"{node}/{i}" for i in draw(st.permutations(range(6)))] for node in ("n-0", "n-1")}
    options = []
    for old in range(draw(st.integers(0, 5))):
        node, tp = draw(st.sampled_from(sorted(free))), draw(st.sampled_from((1, 2, 4)))
        if len(free[node]) >= tp:
            options.append(option(old, tuple(free[node].pop() for _ in range(tp))))
    return options


def counted(inventory: InventoryRows, use: Mapping[Row, int]) -> IntArray:
    listed = ColumnList(inventory.rows, COSTS.routes)
    listed.add(use, 0.0)
    return listed.columns().uses[0]


def rows_admit(inventory: InventoryRows, going_on: list[Candidate], new: list[int]) -> bool:
    """Return whether the rows hold, with the most room in shared nodes that their integer variables can express."""
    total = np.zeros(len(inventory.limits), dtype=np.int64)
    for candidate in itertools.chain(going_on, (new_replica(template(tp)) for tp in new)):
        total += counted(inventory, inventory.of(candidate))
    for floor in inventory.floors():
        (row,) = (row for row in floor if row[0] == "node")
        room = inventory.limits[inventory.rows[row]] - total[inventory.rows[row]]
        total += int(room // floor[row]) * counted(inventory, floor) if room > 0 else 0
    return bool(np.all(total <= inventory.limits))


def fits(going_on: list[Candidate], new: list[int]) -> bool:
    """Return whether all groups fit, by trying every node for every group."""
    taken = [device for o in going_on for device in o.named()]
    free = [6 - sum(device.startswith(node) for device in taken) for node in ("n-0/", "n-1/")]
    for nodes in itertools.product((0, 1), repeat=len(new)):
        if all(sum(tp for tp, at in zip(new, nodes, strict=True) if at == n) <= free[n] for n in (0, 1)):
            return True
    return False


@given(named_groups(), st.data(), st.lists(st.sampled_from((1, 2, 4)), max_size=5))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_rows_admit_what_fits_and_nothing_else(options: list[Candidate], data: st.DataObject, new: list[int]) -> None:
    going_on = [o for o in options if data.draw(st.booleans())]
    inventory = inventory_of(COSTS, PLACES, options, (), None)
    assert rows_admit(inventory, going_on, new) == fits(going_on, new)
    chosen = [*going_on, *(new_replica(template(tp)) for tp in new)]
    if not fits(going_on, new):
        with pytest.raises(UnboundPlanError):
            name_gpus(COSTS, PLACES, chosen, {})
        return
    stages = name_gpus(COSTS, PLACES, chosen, {})
    names = [name for replica in stages for stage in replica for name in stage.devices]
    assert len(names) == len(set(names)) == sum(len(list(o.named())) for o in going_on) + sum(new)
    assert all(len({name.partition("/")[0] for name in stage.devices}) == 1 for r in stages for stage in r)


@pytest.mark.parametrize(
    ("named", "new", "expected"),
    [
        ([("n-0/0", "n-0/1", "n-0/2", "n-0/3")], [4], True),
        ([("n-0/0", "n-0/1", "n-0/2", "n-0/3")], [4, 4], False),  # 12 GPUs in all, but each node has 2 left
        ([("n-0/0",), ("n-0/1", "n-0/2")], [4], True),
        ([("n-0/0",), ("n-0/1", "n-0/2")], [4, 4], False),
        ([("n-0/0",)], [2, 2, 2, 2, 2], True),
        ([("n-0/0",), ("n-1/0",)], [2, 2, 2, 2, 2], False),
    ],
)
def test_room_for_groups_is_counted_node_by_node(named: list[tuple[str, ...]], new: list[int], expected: bool) -> None:
    options = [option(old, devices) for old, devices in enumerate(named)]
    assert fits(options, new) == expected
    assert rows_admit(inventory_of(COSTS, PLACES, options, (), None), options, new) == expected


def test_gpus_that_hold_the_right_shard_already_are_taken_for_it() -> None:
    from hetis.solver.replanning.change import Holding

    layers = PROBLEM.model.num_layers
    held = {f"n-1/{5 - rank}": Holding(gpu="A", first_layer=0, end_layer=layers, tp=2, rank=rank) for rank in (0, 1)}
    ((stage,),) = name_gpus(COSTS, PLACES, [new_replica(template(2))], held)
    assert stage.devices == ["n-1/5", "n-1/4"]


def test_idle_gpus_come_before_those_that_hold_something_else() -> None:
    from hetis.solver.replanning.change import Holding

    held = {f"n-{n}/{i}": Holding(gpu="A", first_layer=0, end_layer=1, tp=1, rank=0) for n in (0, 1) for i in range(4)}
    ((stage,),) = name_gpus(COSTS, PLACES, [new_replica(template(2))], held)
    assert {name[-1] for name in stage.devices} == {"4", "5"}
