"""Calibration finds what devices take, and leaves them as they were."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.generate import engine_from_folder, generate, local_devices
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.engine.stage import Stage, kv_shape
from hetis.runtime.measured.calibration import calibrate, with_exchange
from hetis.runtime.measured.coefficients import Coefficients, device_seconds, scaled, with_coefficients
from hetis.runtime.measured.fitting import Call, fit_calls, nonnegative_fit
from hetis.runtime.model.config import read_config
from hetis.runtime.model.decoder import Decoder
from hetis.runtime.server.measuring import measure_engine
from tests.runtime.checkpoints import random_model, random_prompts
from tests.runtime.measured.paced import FakeClock, Pace, PacedDevice, paced_devices

PACES = (
    Pace(head_s=2e-6, kv_byte_s=3e-9, call_s=4e-5),
    Pace(head_s=1e-5, kv_byte_s=1e-8, call_s=7e-5, read_s=1e-6),
)


def engine_of(paces: tuple[Pace, ...], clock: FakeClock, *, pages: int = 1000) -> Engine:
    return engine_from_folder(random_model().folder, paced_devices(paces, clock, pages=pages))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 10), min_size=3, max_size=3), st.integers(0, 2**16))
def test_the_fit_finds_coefficients_that_are_not_negative(truth: list[float], seed: int) -> None:
    matrix = np.random.default_rng(seed).uniform(0.1, 1, (9, 3))
    assert nonnegative_fit(matrix, matrix @ np.array(truth)) == pytest.approx(truth, abs=1e-6)
    assert (nonnegative_fit(matrix, matrix @ (np.array(truth) - 5)) >= 0).all()


def test_calls_are_fitted_by_their_relative_errors_and_none_give_nothing() -> None:
    calls = [Call(heads=h, kv_bytes=g, seconds=2e-6 * h + 5e-10 * g + 1e-5) for h in (1, 8) for g in (1e3, 1e6, 1e8)]
    assert fit_calls(calls) == pytest.approx((2e-6, 5e-10, 1e-5))
    assert fit_calls([]) == (0.0, 0.0, 0.0)


def test_dispatch_goes_by_what_the_devices_take() -> None:
    clock = FakeClock()
    engine = engine_of(PACES, clock)
    measured = measure_engine(engine, clock=clock, pause=clock.pause)
    costs = engine.placement.state.stage
    assert costs is engine.placement.costs
    assert measured.predictor is not None
    assert measured.predictor.costs is costs
    for i, pace in enumerate(PACES):
        # What another device takes beyond its pace is that its answer is read.
        assert costs.head_s[i, 0] == pytest.approx(pace.head_s, rel=1e-3)
        assert costs.kv_byte_s[i, 0] == pytest.approx(pace.kv_byte_s, rel=1e-3)
        assert costs.call_s[i, 0] + costs.transfer_s[i] == pytest.approx(pace.call_s + pace.read_s, rel=1e-3)
    assert measured.following[0].scales == (1.0, 1.0)
    assert not engine.has_work
    assert list(engine.placement.state.free_blocks()) == [1000, 1000]
    assert all(device.pool.free_pages == 1000 for device in engine.stage.devices)  # type: ignore[attr-defined]


def test_an_answer_that_is_there_already_takes_what_reading_it_takes() -> None:
    clock = FakeClock()
    engine = engine_of(PACES, clock)
    found = calibrate(engine.stage.devices, groups=4, exchange_bytes_per_head=96.0, clock=clock, pause=clock.pause)
    assert [found[name].read_s for name in ("d0", "d1")] == pytest.approx([0.0, 1e-6])


def test_the_exchange_is_told_apart_by_copies_and_the_sum_stays() -> None:
    """A device whose copies take 1e-8 s per byte and 2e-5 s each: so do its exchanges, of what calls take in all."""
    clock = FakeClock()
    engine = engine_of(PACES, clock)
    away = engine.stage.devices[1]
    assert isinstance(away, PacedDevice)
    export = away.export

    def slow_export(request, incarnation, heads, first, last):  # type: ignore[no-untyped-def]
        k, v = export(request, incarnation, heads, first, last)
        clock.pause(2e-5 + 1e-8 * (k.numel() + v.numel()) * k.element_size())
        return k, v

    away.export = slow_export  # type: ignore[method-assign]
    found = calibrate(engine.stage.devices, groups=4, exchange_bytes_per_head=96.0, clock=clock, pause=clock.pause)
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


def test_a_device_without_room_to_be_measured_keeps_the_first_guess() -> None:
    clock = FakeClock()
    engine = engine_of(PACES, clock, pages=0)
    guess = {"d1": Coefficients(pieces=((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), transfer_byte_s=7.0, transfer_s=8.0)}
    even = engine.placement.costs
    measure_engine(engine, planned=guess, clock=clock, pause=clock.pause)
    costs = engine.placement.costs
    assert costs.head_s.tolist() == [[even.head_s[0, 0]] * 2, [1.0, 4.0]]
    assert (costs.transfer_byte_s[1], costs.transfer_s[1]) == (7.0, 8.0)


def test_scales_count_for_all_that_a_device_takes() -> None:
    engine = engine_from_folder(random_model().folder, local_devices([50, 50]))
    known = {"local1": Coefficients(pieces=((1.0, 2.0, 3.0),), transfer_byte_s=0.5, transfer_s=4.0)}
    costs = with_coefficients(engine.placement.costs, known)
    heads, kv_bytes = np.array([2.0, 2.0]), np.array([10.0, 10.0])
    before = device_seconds(costs, heads, kv_bytes)
    exchange = costs.heads.exchange_bytes_per_head
    assert before[1] == pytest.approx(2 + 20 + 3 + 0.5 * exchange * 2 + 4)
    after = device_seconds(scaled(costs, np.array([1.0, 3.0])), heads, kv_bytes)
    assert after == pytest.approx(before * [1, 3])
    assert device_seconds(costs, np.array([2.0, 0.0]), kv_bytes)[1] == 0.0


def test_every_stage_of_a_pipeline_is_measured_and_text_stays_what_it_was() -> None:
    clock, folder = FakeClock(), random_model().folder
    config, stages = read_config(folder), []
    for layers, paces in ((range(2), PACES), (range(2, 3), PACES[::-1])):
        shape = kv_shape(config, layers, page_tokens=16, dtype=config.dtype)
        devices = paced_devices(paces, clock, pages=1000)(shape)
        stages.append(Stage(Decoder.from_folder(folder, layers=layers), devices))
    engine = Engine(config, stages)
    measured = measure_engine(engine, clock=clock, pause=clock.pause)
    assert measured.predictor is None
    assert sorted(measured.following) == sorted(measured.copy_byte_s) == [0, 1]
    assert [len(measured.costs()), len(measured.copy_byte_s[1])] == [4, 2]
    for part, paces in zip(engine.stages, (PACES, PACES[::-1]), strict=True):
        expected = [pace.kv_byte_s for pace in paces]
        assert part.placement.costs.kv_byte_s[:, 0] == pytest.approx(expected, rel=1e-3)
    [prompt] = random_prompts(3, 1)
    [answer] = generate(engine, [prompt], SamplingParams(max_tokens=20))
    assert answer.tokens == random_model().generate(prompt, 20)
    assert measured.costs()[0].measured_s > 0


def test_the_log_says_how_far_a_device_is_from_its_plan(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    planned = {"d1": Coefficients(pieces=((0.0, PACES[1].kv_byte_s / 3, 0.0),)), "elsewhere": Coefficients(pieces=())}
    with caplog.at_level(logging.INFO, logger="hetis.runtime.server.measuring"):
        measure_engine(engine_of(PACES, clock), planned=planned, clock=clock, pause=clock.pause)
    # 8 heads, 4 x 512 positions of 64 bytes: (80 + 1311 + 71) us beside 1311 / 3 us.
    assert caplog.messages == ["device d1 takes 3.3 times what the plan says"]
