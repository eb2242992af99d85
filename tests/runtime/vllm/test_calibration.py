"""Calibration finds the times of devices, and leaves them unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.vllm.calibration import (
    Calibration,
    Coefficients,
    TimedCall,
    calibrate,
    device_seconds,
    fit_calls,
    nonnegative_fit,
    scaled,
    with_coefficients,
    with_exchange,
)
from hetis.solver.dispatch.dispatch_problem import HeadShape, Primary, Stage
from tests.runtime.vllm.paced import SHAPE, FakeClock, Pace, PacedDevice, paced_devices

PACES = (
    Pace(head_s=2e-6, kv_byte_s=3e-9, call_s=4e-5),
    Pace(head_s=1e-5, kv_byte_s=1e-8, call_s=7e-5, read_s=1e-6),
)


GROUPS, EXCHANGE_BYTES = 4, 96.0
COSTS = Stage(
    heads=HeadShape(head_groups=4, queries_per_group=2, kv_bytes_per_token=64.0, exchange_bytes_per_head=96.0),
    devices=("d0", "d1"),
    head_s=np.full((2, 1), 1e-7),
    kv_byte_s=np.full((2, 1), 1e-10),
    call_s=np.full((2, 1), 1e-5),
    transfer_byte_s=np.zeros(2),
    transfer_s=np.zeros(2),
    primary=Primary(device=0),
)


def calibrated(devices: Sequence[AttentionDevice], clock: FakeClock) -> Mapping[str, Calibration]:
    found = {}
    for device in devices:
        one = calibrate(device, groups=GROUPS, exchange_bytes_per_head=EXCHANGE_BYTES, clock=clock, pause=clock.pause)
        if one is not None:
            found[device.name] = one
    return found


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 10), min_size=3, max_size=3), st.integers(0, 2**16))
def test_the_fit_finds_coefficients_that_are_not_negative(truth: list[float], seed: int) -> None:
    matrix = np.random.default_rng(seed).uniform(0.1, 1, (9, 3))
    assert nonnegative_fit(matrix, matrix @ np.array(truth)) == pytest.approx(truth, abs=1e-6)
    assert (nonnegative_fit(matrix, matrix @ (np.array(truth) - 5)) >= 0).all()


def test_calls_are_fitted_by_their_relative_errors_and_none_give_nothing() -> None:
    calls = [
        TimedCall(heads=h, kv_bytes=g, seconds=2e-6 * h + 5e-10 * g + 1e-5) for h in (1, 8) for g in (1e3, 1e6, 1e8)
    ]
    assert fit_calls(calls) == pytest.approx((2e-6, 5e-10, 1e-5))
    assert fit_calls([]) == (0.0, 0.0, 0.0)


def test_what_dispatch_goes_by_is_what_the_devices_take_and_they_hold_nothing_afterwards() -> None:
    clock = FakeClock()
    devices = paced_devices(PACES, clock, pages=1000)(SHAPE)
    found = calibrated(devices, clock)
    costs = with_coefficients(COSTS, {name: one.coefficients for name, one in found.items()})
    for i, pace in enumerate(PACES):
        # Beyond its pace, another device takes the time to read its answer.
        assert costs.head_s[i, 0] == pytest.approx(pace.head_s, rel=1e-3)
        assert costs.kv_byte_s[i, 0] == pytest.approx(pace.kv_byte_s, rel=1e-3)
        assert costs.call_s[i, 0] + costs.transfer_s[i] == pytest.approx(pace.call_s + pace.read_s, rel=1e-3)
    assert all(device.pool.free_pages == 1000 for device in devices)  # type: ignore[attr-defined]


def test_an_answer_that_is_there_already_takes_what_reading_it_takes() -> None:
    clock = FakeClock()
    found = calibrated(paced_devices(PACES, clock, pages=1000)(SHAPE), clock)
    assert [found[name].read_s for name in ("d0", "d1")] == pytest.approx([0.0, 1e-6])


def test_the_exchange_is_told_apart_by_copies_and_the_sum_stays() -> None:
    """Copies take 1e-8 s per byte and 2e-5 s each, and exchanges count as the same part of a call's total time."""
    clock = FakeClock()
    devices = paced_devices(PACES, clock, pages=1000)(SHAPE)
    away = devices[1]
    assert isinstance(away, PacedDevice)
    export = away.export

    def slow_export(request, incarnation, heads, first, last):  # type: ignore[no-untyped-def]
        k, v = export(request, incarnation, heads, first, last)
        clock.pause(2e-5 + 1e-8 * (k.numel() + v.numel()) * k.element_size())
        return k, v

    away.export = slow_export  # type: ignore[method-assign]
    found = calibrated(devices, clock)
    coefficients, pace = found["d1"].coefficients, PACES[1]
    assert found["d1"].copy_byte_s == pytest.approx(1e-8)
    assert coefficients.transfer_byte_s == pytest.approx(1e-8)
    assert coefficients.transfer_s == pytest.approx(2e-5)
    assert coefficients.pieces[0][0] + 96 * coefficients.transfer_byte_s == pytest.approx(pace.head_s, rel=1e-3)
    assert coefficients.pieces[0][2] + coefficients.transfer_s == pytest.approx(pace.call_s + pace.read_s, rel=1e-3)
    assert found["d0"].coefficients.transfer_s == 0.0


@given(st.floats(0, 1e-3), st.floats(0, 1e-3), st.floats(0, 1e-3), st.floats(0, 1e-3), st.integers(1, 4096))
@example(2.3e-7, 3e-6, 1e-6, 1e-6, 320)  # 2.3e-7 - 2.3e-7 / 320 * 320 < 0
def test_an_exchange_slower_than_the_whole_leaves_nothing_and_never_less(
    head_s: float, call_s: float, byte_s: float, copy_s: float, size: int
) -> None:
    found = with_exchange(Coefficients(pieces=((head_s, 1e-9, call_s),)), float(size), byte_s=byte_s, copy_s=copy_s)
    ((own_s, kv_byte_s, own_call_s),) = found.pieces
    assert min(own_s, own_call_s, found.transfer_byte_s, found.transfer_s) >= 0.0
    assert kv_byte_s == 1e-9
    assert own_s + found.transfer_byte_s * size == pytest.approx(head_s)
    assert own_call_s + found.transfer_s == pytest.approx(call_s)
    assert found.transfer_byte_s == pytest.approx(min(byte_s, head_s / size))


def test_a_device_without_room_to_be_measured_is_left_out_and_keeps_the_first_guess() -> None:
    clock = FakeClock()
    small = PacedDevice("d1", SHAPE, 0, pace=PACES[1], clock=clock)
    found = calibrated([*paced_devices(PACES[:1], clock, pages=1000)(SHAPE), small], clock)
    assert set(found) == {"d0"}
    guess = with_coefficients(COSTS, {"d1": Coefficients(pieces=((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), transfer_s=8.0)})
    costs = with_coefficients(guess, {name: one.coefficients for name, one in found.items()})
    assert costs.head_s[1].tolist() == [1.0, 4.0]
    assert costs.transfer_s[1] == 8.0


def test_scales_count_for_all_that_a_device_takes() -> None:
    known = {"d1": Coefficients(pieces=((1.0, 2.0, 3.0),), transfer_byte_s=0.5, transfer_s=4.0)}
    costs = with_coefficients(COSTS, known)
    heads, kv_bytes = np.array([2.0, 2.0]), np.array([10.0, 10.0])
    before = device_seconds(costs, heads, kv_bytes)
    exchange = costs.heads.exchange_bytes_per_head
    assert before[1] == pytest.approx(2 + 20 + 3 + 0.5 * exchange * 2 + 4)
    after = device_seconds(scaled(costs, np.array([1.0, 3.0])), heads, kv_bytes)
    assert after == pytest.approx(before * [1, 3])
    assert device_seconds(costs, np.array([2.0, 0.0]), kv_bytes)[1] == 0.0
