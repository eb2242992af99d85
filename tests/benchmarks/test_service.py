"""The benchmark of the service with a planner and twenty agents for a second or two; no time is asserted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from benchmarks import service
from benchmarks.measuring.rows import Row
from benchmarks.measuring.service_calls import KEYS, Extent
from benchmarks.measuring.service_planner import NODES_PER_CELL, cell_fleet
from hetis.planner.convert.documents import read_document
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Plan

# Reports are counted from metrics that may be a second old.
TINY = Extent(agents=20, idle_s=0.3, report_s=1.5, rates=(50,), beside_rate=20, changes=3, calls=24)


@pytest.fixture(scope="module")
def found() -> Sequence[Row]:
    return list(service.all_rows(TINY))


def row(found: Sequence[Row], name: str) -> Row:
    return next(row for row in found if row["name"] == name)


def number(found: Sequence[Row], name: str, key: str) -> float:
    value = row(found, name)[key]
    assert isinstance(value, float)
    return value


def test_all_rows_have_the_keys_of_one_table(found: Sequence[Row]) -> None:
    assert {tuple(row) for row in found} == {KEYS}
    assert len({row["name"] for row in found}) == len(found)


def test_reports_are_counted(found: Sequence[Row]) -> None:
    assert number(found, "50 reports/s asked for", "rate_per_s") > 0
    assert number(found, "50 reports/s asked for", "cpu_us") > 0
    assert math.isfinite(number(found, "50 reports/s asked for", "lag_s"))


def test_every_change_goes_through_its_phases_in_their_order(found: Sequence[Row]) -> None:
    for beside in ("", ", beside 20 reports/s"):
        times = [number(found, f"change: {what}{beside}", "p50_ms") for what in service.STEPS.values()]
        assert times == sorted(times)
        assert str(row(found, f"change: DONE{beside}")["note"]).endswith(" 0 reports without a change")


def test_calls_are_shown_beside_an_empty_one(found: Sequence[Row]) -> None:
    assert number(found, "empty call, 16 at once", "over_empty_p50") == 1
    for at_once in service.AT_ONCE:
        assert number(found, f"UpdateCluster, {at_once} at once", "over_empty_p99") > 0
        assert row(found, f"UpdateCluster, {at_once} at once")["at_once"] == at_once


def test_a_fleet_of_cells_is_what_its_plan_is_for() -> None:
    fleet = cell_fleet(3 * NODES_PER_CELL + 2)
    plan = read_document(fleet.plan, Plan)
    assert isinstance(plan, Plan)
    assert len(plan.replicas) == len(fleet.cells) == 3
    assert fleet.num_nodes == 29
    nodes = {device.name.partition("/")[0] for device in read_document(fleet.cluster, Cluster).devices()}
    assert nodes == {node for cell in fleet.cells for node in cell} | set(fleet.spare)
