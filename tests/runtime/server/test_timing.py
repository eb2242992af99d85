"""What a step is predicted to take, and how that is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hetis.runtime.engine.step import Chunk, Step
from hetis.runtime.server.measuring import measure_engine
from hetis.runtime.server.timing import DenseCost, StepPredictor
from hetis.solver.dispatch.problem import HeadShape, Primary
from hetis.solver.dispatch.problem import Stage as StageCosts
from tests.runtime.server.live import Live, engine_of

COSTS = StageCosts(
    heads=HeadShape(head_groups=2, queries_per_group=3, kv_bytes_per_token=10.0, exchange_bytes_per_head=4.0),
    devices=("a", "b"),
    head_s=np.array([[1.0], [2.0]]),
    kv_byte_s=np.array([[0.1], [0.2]]),
    call_s=np.array([[5.0], [6.0]]),
    transfer_byte_s=np.array([9.0, 0.5]),
    transfer_s=np.array([9.0, 7.0]),
    primary=Primary(device=0),
)


def step_of(heads: list[list[int]], positions: list[int], chunks: tuple[Chunk, ...] = ()) -> Step:
    rows = len(heads)
    return Step(
        epoch=1,
        number=1,
        tokens=np.zeros(len(positions), np.int64),
        positions=np.array(positions, np.int64),
        requests=np.arange(rows, dtype=np.int64),
        incarnations=np.zeros(rows, np.int64),
        heads=np.array(heads, np.int64).reshape(rows, 2),
        chunks=chunks,
        outputs=np.arange(rows, dtype=np.int64),
    )


def test_a_step_takes_its_dense_part_and_per_layer_the_attention_of_the_devices() -> None:
    # a: 3 heads, 10 positions of 10 bytes: 3 + 10 + 5. b: 9 heads, 10 + 2 * 20 positions, and the exchange of
    # 9 heads of 4 bytes: 18 + 100 + 6 + 0.5 * 36 + 7.
    step = step_of([[0, 1], [1, 1]], [9, 19])
    a_s, b_s = 18.0, 149.0
    dense = DenseCost(call_s=1000.0, row_s=100.0)
    in_turn = StepPredictor(COSTS, layers=2, dense=dense, in_turn=True)
    assert in_turn.step_s(step) == pytest.approx(2 * (a_s + b_s) + 1200)
    at_once = StepPredictor(COSTS, layers=2, dense=dense, in_turn=False)
    assert at_once.step_s(step) == pytest.approx(2 * b_s + 1200)


def test_a_device_without_heads_takes_nothing_and_a_step_that_prefills_is_not_predicted() -> None:
    predictor = StepPredictor(COSTS, layers=1, dense=DenseCost(call_s=0.0, row_s=0.0), in_turn=False)
    assert predictor.step_s(step_of([[0, 0]], [0])) == pytest.approx(6 + 0.1 * 20 + 5)
    assert predictor.step_s(step_of([], [])) is None
    chunk = Chunk(request=5, incarnation=0, first=0, count=1, total=1, heads=(0, 0))
    assert predictor.step_s(step_of([[0, 0]], [0, 0], (chunk,))) is None


def test_measuring_leaves_the_engine_as_it_was_and_metrics_tell_both_times(folder: Path) -> None:
    engine = engine_of(folder)
    predictor = measure_engine(engine).predictor
    assert predictor is not None
    assert not engine.has_work
    assert list(engine.placement.state.free_blocks()) == [400, 400]
    assert all(device.pool.free_pages == 400 for device in engine.stage.devices)  # type: ignore[attr-defined]
    assert predictor.costs.devices == ("cpu0", "cpu1")
    assert predictor.dense.seconds(1) > 0
    with Live(engine, folder, predictor=predictor) as live:
        live.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 20, "ignore_eos": True})
        assert live.metric("hetis_decode_step_seconds_predicted_total") > 0
        assert live.metric("hetis_decode_step_seconds_measured_total") > 0
