"""Ranges of modelled GPUs: a left-out GPU takes no part, and the range covers nine in ten times of the next GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats import catalogue
from hetis.formats.positions import parse_text
from hetis.formats.profile import parse_profile
from hetis.profiler.defaults import profile_text, shipped_profile
from hetis.profiler.fit.points import Points
from hetis.profiler.ranges import UNKNOWN_ERROR, range_factors, stated_error
from hetis.profiler.roofline import modelled_profile, shipped_efficiencies
from hetis.solver.profile import Fit, FitScope, Op, Piece, Provenance, Source
from tests.profiler.shipped_points import shipped_points
from tools.efficiency import measured_tables, without
from tools.left_out import ANY_HOST, Operator, Pieces, Tables, Trial, covering_error

ARCHITECTURES = {"one": "Old", "two": "Old", "three": "New", "four": "Newer"}


def points(slower: float) -> Points:
    byte_s = np.linspace(1e-4, 1e-3, 20)
    return Points(
        op=Op.DENSE,
        scope=FitScope(),
        features=np.stack([np.ones(20), np.zeros(20), byte_s], axis=1),
        seconds=slower * byte_s,
        shapes=["one"] * 20,
        sizes={"tokens": byte_s},
        origin="a test",
    )


def mean_rate(sets: Sequence[Points]) -> Pieces:
    return ((0.0, 0.0, float(np.mean([one.seconds / one.features[:, 2] for one in sets]))),)


def tables(**slower: float) -> Tables:
    by_gpu = {name: points(factor) for name, factor in slower.items()}
    dense = Operator(name="dense", points=by_gpu, sources=tuple(by_gpu), fit=mean_rate, family="device")
    return Tables(operators={"dense": dense}, architectures=ARCHITECTURES)


def trial(*ratios: float) -> Trial:
    return Trial(op="dense", gpu="one", relative="Old", ratios=np.array(ratios))


def test_a_gpu_is_modelled_from_its_own_architecture_and_otherwise_from_each_other_one() -> None:
    measured = tables(one=1.0, two=1.0, three=1.0, four=1.0)
    assert measured.relatives("dense", "one") == {"Old": ("two",)}
    assert measured.relatives("dense", "three") == {"Old": ("one", "two"), "Newer": ("four",)}
    assert measured.relatives("dense", "three", without={"four", "one"}) == {"Old": ("two",)}
    hosts = replace(measured.operators["dense"], by_architecture=False)
    links = Tables(operators={"dense": hosts}, architectures=ARCHITECTURES)
    assert links.relatives("dense", "one") == {ANY_HOST: ("two", "three", "four")}


def test_trials_say_how_far_each_gpu_is_from_its_relatives() -> None:
    """By hand: New is twice as slow as Old, whose two GPUs are alike."""
    found = {(one.gpu, one.relative): one for one in tables(one=1.0, two=1.0, three=2.0).trials()}
    assert set(found) == {("one", "Old"), ("two", "Old"), ("three", "Old")}
    assert found["three", "Old"].ratios == pytest.approx(0.5)
    assert found["three", "Old"].factors == pytest.approx(1.0)  # half the time counts like twice the time
    assert found["three", "Old"].covered(0.99) == 0.0
    assert found["one", "Old"].factors == pytest.approx(0.0, abs=1e-12)


def test_what_is_left_out_takes_no_part_in_its_model_or_range() -> None:
    usual, strange = tables(one=1.0, two=1.1, three=1.3, four=1.5), tables(one=1.0, two=1.1, three=1.3, four=9.0)
    for measured in (usual, strange):
        assert measured.range_error("dense", without={"four"}) == usual.range_error("dense", without={"four"})
        assert measured.mean_error("dense", without={"four"}) == usual.mean_error("dense", without={"four"})
    assert usual.range_error("dense") != strange.range_error("dense")
    assert usual.mean_error("dense", without={"one", "two", "three"}) is None  # a single GPU gives no error


def test_a_range_that_is_assumed_is_not_derived() -> None:
    measured = tables(one=1.0, two=2.0)
    assumed = Tables(
        operators={"dense": replace(measured.operators["dense"], family=None)}, architectures=ARCHITECTURES
    )
    assert assumed.range_error("dense") is None
    assert assumed.mean_error("dense") is None


def test_one_more_trial_that_nothing_covers_decides_the_range() -> None:
    """By hand: of 19 trials of one point, 0.9 x 20 = 18 must be covered; of 8, all."""
    many = [trial(1.0 + 0.1 * number) for number in range(1, 20)]
    assert covering_error(many) == pytest.approx(1.8)
    assert covering_error(many[:8]) == pytest.approx(0.8)
    assert covering_error([trial(0.5)]) == pytest.approx(1.0)


@given(st.lists(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=6), min_size=1, max_size=24))
def test_no_smaller_error_holds_enough(ratios: list[list[float]]) -> None:
    """Oracle: the votes themselves, at the error found and at the smaller error of every point."""
    trials = [trial(*some) for some in ratios]
    needed = min(0.9 * (len(trials) + 1), len(trials)) - 1e-9
    error = covering_error(trials)
    assert sum(one.covered(error) for one in trials) >= needed
    smaller = [factor for one in trials for factor in one.factors if factor < error - 0.01]
    assert all(sum(one.covered(float(factor)) for one in trials) < needed for factor in smaller)


def test_nine_in_ten_times_of_the_next_gpu_are_held() -> None:
    """The promise itself: GPUs from one distribution, each with an error of its own and noise on every point."""
    rng = np.random.default_rng(0)

    def drawn() -> Trial:
        return trial(*np.exp(rng.normal(0.0, 0.2) + rng.normal(0.0, 0.1, 30)))

    held = [drawn().covered(covering_error([drawn() for _ in range(12)])) for _ in range(400)]
    assert 0.9 <= np.mean(held) <= 0.97


def fit(**known: float | None) -> Fit:
    provenance = Provenance(source=Source.MODELLED, origin="a test", **known)
    return Fit(op=Op.DENSE, pieces=(Piece(fixed_s=1.0),), provenance=provenance)


def test_a_range_is_a_factor_both_ways_and_a_mean_error_one_of_predictions() -> None:
    assert range_factors(fit(range_error=3.0, held_out_mape=0.1)) == (0.25, 4.0)
    assert range_factors(fit(held_out_mape=0.2)) == pytest.approx((1 / 1.2, 1 / 0.8))
    assert range_factors(fit(held_out_mape=7.0)) == pytest.approx((1 / 1.9, 10.0))
    assert stated_error(fit()) == UNKNOWN_ERROR


def test_profiles_state_the_range_where_they_are_modelled_for_a_gpu_nobody_measured() -> None:
    ranges = {op.range_error for arch in shipped_efficiencies().architectures.values() for op in arch.ops.values()}
    assert len(ranges) == 1  # all operators of a device share one range
    for gpu in ("L4", "P100-PCIe-12GB"):
        stated = {f.op: f.provenance.range_error for f in modelled_profile(catalogue.find_gpu(gpu).gpu).fits}
        assert {stated[op] for op in (Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION)} == ranges
        assert stated[Op.ALL_REDUCE] == shipped_efficiencies().links["all_reduce_pcie"].range_error
        assert stated[Op.STEP] is None
    own = modelled_profile(catalogue.find_gpu("A100-SXM-80GB").gpu)
    assert next(f for f in own.fits if f.op is Op.DENSE).provenance.range_error is None


def test_a_range_survives_the_file() -> None:
    profile = modelled_profile(catalogue.find_gpu("L4").gpu)
    assert parse_profile(*parse_text(profile_text(profile), "L4.json")) == profile


def test_points_of_shipped_profiles_take_the_times_of_their_fits() -> None:
    found = shipped_points()
    (dense,) = (one for one in found["A40"] if one.op is Op.DENSE)
    profile, gpu = shipped_profile("A40"), catalogue.find_gpu("A40").gpu
    (fitted,) = (one for one in profile.fits if one.op is Op.DENSE and one.provenance.source is Source.FITTED)
    _, flop_s, byte_s = dense.features[100]
    assert dense.seconds[100] == pytest.approx(
        fitted.seconds(flops=flop_s * gpu.fp16_flops, num_bytes=byte_s * gpu.mem_bytes_per_s)
    )


def test_a_profile_without_a_gpu_knows_nothing_of_it() -> None:
    every = shipped_points()
    few = {name: [one for one in found if one.op is Op.DENSE or len(found) > 3] for name, found in every.items()}
    gpu = catalogue.find_gpu("L40S").gpu
    modelled = modelled_profile(gpu, without(measured_tables(few), gpu, "Hopper"))
    for one in modelled.fits:
        assert one.op in (Op.STEP, Op.TRANSFER) or "without L40S" in one.provenance.origin
        assert one.provenance.held_out_mape is None or one.provenance.held_out_mape < 1.5
    spoilt = {
        name: [replace(one, seconds=one.seconds * (7.0 if name == "L40S" else 1.0)) for one in found]
        for name, found in few.items()
    }
    assert modelled_profile(gpu, without(measured_tables(spoilt), gpu, "Hopper")) == modelled
