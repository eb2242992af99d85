"""Dispatch follows the measured costs of every device and the times of its steps, and events are counted."""

from __future__ import annotations

import pytest

from hetis.runtime.vllm.calibration import Calibration, Coefficients, head_shape
from hetis.runtime.vllm.costs import HERE, EngineCosts, LayerTime
from hetis.runtime.vllm.counts import COUNTERS, GAUGES, merged, summary
from hetis.runtime.vllm.executing import EVERY_S, SchedulerCounts
from hetis.runtime.vllm.steps import Exchanged, RankReport, WorkerReport
from tests.runtime.vllm.scheduling import NAMES, World

SHAPE = head_shape(groups=4, queries=2, head_dim=8, item_bytes=4, block_tokens=16)


def calibration(head_s: float, *, call_s: float = 1e-6, copy_byte_s: float = 2e-9) -> Calibration:
    return Calibration(
        coefficients=Coefficients(pieces=((head_s, 1e-10, call_s),), transfer_byte_s=1e-10, transfer_s=1e-6),
        copy_byte_s=copy_byte_s,
        read_s=0.0,
    )


def test_a_group_has_all_its_queries_and_exchanges_its_key_and_value_once() -> None:
    assert SHAPE.kv_bytes_per_token == 2 * 8 * 4
    assert SHAPE.exchange_bytes_per_head * SHAPE.queries_per_group == (2 * 2 + 2) * 8 * 4


def test_of_several_ranks_the_slowest_counts() -> None:
    costs = EngineCosts(SHAPE, ["w"])
    costs.measured(0, {0: calibration(3e-6), 1: calibration(1e-6, call_s=9e-6)})
    costs.measured(1, {0: calibration(2e-6, copy_byte_s=5e-9), 1: calibration(4e-6)})
    assert costs.stage.devices == (HERE, "w")
    assert costs.stage.head_s[:, 0].tolist() == [3e-6, 4e-6]
    assert costs.stage.call_s[:, 0].tolist() == [1e-6, 9e-6]
    assert costs.link_byte_s.tolist() == [5e-9, 2e-9]


def test_what_the_plan_says_counts_only_where_nothing_was_measured() -> None:
    planned = {"w": Coefficients(pieces=((7e-6, 0.0, 0.0),))}
    costs = EngineCosts(SHAPE, ["w"])
    costs.planned(planned)
    assert costs.stage.head_s[1, 0] == 7e-6
    costs.measured(0, {0: calibration(3e-6), 1: calibration(1e-6)})
    costs.planned(planned)
    assert costs.stage.head_s[1, 0] == 1e-6


def test_a_device_that_takes_twice_as_long_costs_twice_as_much() -> None:
    world = World()
    world.side.workers_connected({(0, 0): (400, 400)}, {(0, 0): {n: calibration(1e-6) for n in range(3)}})
    before = world.side.allocator.state.stage.head_s.copy()
    calibrated_s = 1e-6 * 8 + 1e-10 * 1000 + 1e-6 + 1e-10 * SHAPE.exchange_bytes_per_head * 8 + 1e-6
    taken = LayerTime(heads=8, kv_bytes=1000.0, least_s=2 * calibrated_s, most_s=2 * calibrated_s)
    world.side.take_reports({0: RankReport(taken={1: [taken] * 15})})
    world.step()
    after = world.side.allocator.state.stage.head_s
    assert (after / before)[:, 0].tolist() == pytest.approx([1.0, 2.0, 1.0])
    world.side.take_reports({0: RankReport(calibrations={1: calibration(5e-6)})})
    assert world.side.allocator.state.stage.head_s[1, 0] == 5e-6, "it came back, and was measured anew"


def test_the_solver_sends_groups_where_they_cost_least() -> None:
    world = World(policy="solver")
    found = {0: calibration(1e-3), 1: calibration(1e-6), 2: calibration(1e-3)}
    world.side.workers_connected({(0, 0): (400, 400)}, {(0, 0): found})
    world.add("a")
    assert world.devices("a") == (1, 1, 1, 1)


def test_counts_say_what_happened_since_the_last_time() -> None:
    now_s = 0.0
    world = World(policy="remote")
    counts = SchedulerCounts(world.side, clock=lambda: now_s)
    assert counts.take(is_last=False) is not None
    world.add("a")
    name = world.side.allocator.running[0]
    assert world.side.begin_move(name, [0], 0) is not None
    world.step(3)
    world.side.take_reports({0: RankReport(devices={1: WorkerReport(400, Exchanged(4, 0.5, 100, 50))})})
    assert counts.take(is_last=False) is None, "it is not time yet"
    now_s += EVERY_S
    first = counts.take(is_last=False)
    assert first is not None
    world.side.take_reports({0: RankReport(devices={1: WorkerReport(0, Exchanged(2, 0.25, 10, 5))})})
    second = counts.take(is_last=True)
    assert second is not None
    assert first["gauges"]["hetis_head_groups"] == {HERE: 1, NAMES[1]: 1, NAMES[2]: 2}
    assert first["counters"]["hetis_exchanges"] == {NAMES[1]: 4, NAMES[2]: 0}
    assert second["counters"]["hetis_exchanges"] == {NAMES[1]: 2, NAMES[2]: 0}
    assert first["counters"]["hetis_exchange_bytes"][f"{NAMES[1]}|sent"] == 100
    assert first["counters"]["hetis_moves"] == {"engine|begun": 1, "engine|committed": 1}
    assert first["counters"]["hetis_dispatch_decisions"] == {"policy": 1}
    assert len(first["dispatch_s"]) == 1
    assert second["counters"]["hetis_recomputes"] == {"": 1}
    assert second["gauges"]["hetis_device_up"] == {HERE: 1, NAMES[1]: 0, NAMES[2]: 1}
    both = merged(first, second)
    assert both["counters"]["hetis_exchange_seconds"][NAMES[1]] == 0.75
    assert both["gauges"] == second["gauges"]
    assert summary(both)["recomputes"] == 1
    for said, described in ((both["gauges"], GAUGES), (both["counters"], COUNTERS)):
        assert said.keys() == described.keys()
        for metric, samples in said.items():
            for label in samples:
                assert len(label.split("|")) == max(len(described[metric].labels), 1), metric
