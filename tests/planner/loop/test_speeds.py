"""Corrections of profiles: planned times at the planned load, intervals that hold the truth, slow cards by name."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest

from hetis.planner.loop.speeds import ExpectedTimes, MeasuredReplica, SpeedSample, corrections, speeds
from hetis.planner.use_cases.robustness.profile_errors import scaled
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import ReplicaPlan, Role
from tests.planner.use_cases.robustness.studied import planned, posed


@cache
def expected(fleet: str = "paper") -> ExpectedTimes:
    return ExpectedTimes(posed(fleet))


def measured(
    replica: ReplicaPlan, factor: float, *, name: str = "r", noise: float = 0.0, seed: int = 1
) -> MeasuredReplica:
    """Return a replica whose tokens take ``factor`` times as long as expected, at changing loads, with noise."""
    draws, most = random.Random(seed), replica.micro_batch * replica.in_flight
    loads = [most * draws.uniform(0.2, 1.0) for _ in range(12)]
    samples = tuple(
        SpeedSample(
            tpot_s=factor * expected().tpot_s(replica, load) * (1 + noise * draws.gauss(0, 1)), tokens=500, running=load
        )
        for load in loads
    )
    return MeasuredReplica(name=name, plan=replica, samples=samples)


@pytest.mark.parametrize("fleet", ["paper", "h100-p100", "split"])
def test_the_planned_load_has_the_planned_time(fleet: str) -> None:
    decoding = [one for one in planned(fleet).replicas if one.role is not Role.PREFILL]
    for replica in decoding:
        load = replica.micro_batch * replica.in_flight
        assert expected(fleet).tpot_s(replica, load) == pytest.approx(replica.tpot_s, rel=0.05)


def test_more_requests_take_longer_and_slower_profiles_as_much() -> None:
    replica = planned("paper").replicas[0]
    times_s = [expected().tpot_s(replica, load) for load in (1, 8, 64)]
    assert times_s == sorted(times_s)
    slower = ExpectedTimes(replace(posed("paper"), profiles=scaled(posed("paper").profiles, 1.3)))
    assert 1.0 < slower.tpot_s(replica, 8) / times_s[1] <= 1.3 + 1e-9  # links are not in profiles


def test_what_runs_as_its_profile_says_needs_no_correction() -> None:
    (row,) = speeds([measured(planned("paper").replicas[0], 1.0)], expected())
    assert row.correction == pytest.approx(1.0)
    assert not row.is_slow


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    replica = planned("paper").replicas[0]
    found = [speeds([measured(replica, 1.1, noise=0.05, seed=seed)], expected())[0] for seed in range(200)]
    assert sum(abs(one.correction - 1.1) <= one.error for one in found) >= 180


def test_the_card_that_is_slower_than_others_of_its_kind_is_named() -> None:
    replica = planned("paper").replicas[0]
    others = [measured(replica, 1.05, name=f"r{k}", noise=0.02, seed=k) for k in range(5)]
    slow = replace(measured(replica, 1.5, name="slow", noise=0.02), slow_devices=("node/3",))
    kind, named = speeds([*others, slow], expected())
    assert (named.replica, named.devices, named.is_slow) == ("slow", ("node/3",), True)
    assert named.correction - named.error > 1.3
    assert not kind.is_slow  # most of its kind are not
    alone = speeds([replace(slow, slow_devices=())], expected())[1]
    assert alone.devices == tuple(replica.devices())


def test_what_says_too_little_says_nothing() -> None:
    replica = planned("paper").replicas[0]
    few = (SpeedSample(tpot_s=9.0, tokens=3, running=5), SpeedSample(tpot_s=9.0, tokens=300, running=0))
    assert speeds([MeasuredReplica(name="r", plan=replica, samples=few)], expected()) == []
    one = MeasuredReplica(name="r", plan=replica, samples=(SpeedSample(tpot_s=9.0, tokens=300, running=5),))
    (row,) = speeds([one], expected())
    assert row.error == float("inf")
    assert not row.is_slow


def test_a_profile_is_corrected_only_where_one_type_is_measured_well() -> None:
    replica = planned("h100-p100").replicas[0]
    rows = [
        replace(speeds([measured(planned("paper").replicas[0], 1.2)], expected())[0], gpus=gpus, error=error)
        for gpus, error in ((("L4",), 0.05), (("H100",), 0.3), (("A", "B"), 0.01))
    ]
    assert replica
    assert corrections(rows) == {"L4": pytest.approx(1.2)}


def test_gpus_that_are_gone_have_no_expected_time() -> None:
    with pytest.raises(InvalidProblemError, match="lacks GPUs"):
        expected("h100-p100").tpot_s(planned("paper").replicas[0], 8)
