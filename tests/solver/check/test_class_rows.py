"""Which GPUs share a row of a plan's table of device classes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetis.solver.check import Rule
from hetis.solver.cluster import Link, NodeGroup
from tests.solver.check.test_check import A_STAGE
from tests.solver.claimed_plans import claimed, plan_of, rules, unclaimed
from tests.solver.instances import (
    make_node,
    make_problem,
)

SLOW = Link(bytes_per_s=1e8, latency_s=1e-4)


def priced(node: NodeGroup, usd_per_hour: float) -> NodeGroup:
    return replace(node, gpus=tuple(replace(slots, usd_per_hour=usd_per_hour) for slots in node.gpus))


@pytest.mark.parametrize(
    ("other", "num_rows"),
    [
        (make_node("b", "A"), 1),
        (make_node("b", "A", nic=SLOW), 2),
        (replace(make_node("b", "A"), intra_link=SLOW), 2),
        (priced(make_node("b", "A"), 1.0), 1),  # the price of the GPU type
        (priced(make_node("b", "A"), 3.0), 2),
    ],
)
@pytest.mark.parametrize("has_price", [True, False])
def test_equal_classes_of_two_node_groups_have_one_row_and_unequal_ones_two(
    other: NodeGroup, num_rows: int, has_price: bool
) -> None:
    problem = make_problem([make_node("a", "A"), other])
    if not has_price:
        free = {"A": replace(problem.cluster.gpu_types["A"], usd_per_hour=None)}
        problem = replace(problem, cluster=replace(problem.cluster, gpu_types=free))
        num_rows = 2 if other.gpus[0].usd_per_hour is not None else num_rows
    replica = unclaimed(replace(A_STAGE, tp=1, num_layers=6, devices=("a/0",), kv_head_groups_kept=2), in_flight=1)
    plan = plan_of(problem, claimed(replica, problem))
    assert len(plan.prices) == num_rows
    assert rules(plan, problem) == set()
    merged = replace(plan.prices[0], available=2)
    apart = tuple(replace(merged, available=1, used=used) for used in (1, 0))
    assert rules(replace(plan, prices=(merged,) if num_rows == 2 else apart), problem) == {Rule.PRICES}
