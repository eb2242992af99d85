"""Chunks over a past judge ways to charge KV, and a fit without such chunks."""

from __future__ import annotations

import numpy as np
import pytest

from hetis.formats import catalogue
from hetis.formats.measurements import MeasuredBy, MeasuredOp, Measurements, Table
from hetis.solver.profile import Fit, Op, Piece, Provenance, Source
from tools.profile_tables import over_past

A100 = catalogue.find_gpu("A100-SXM-80GB").gpu


def chunks(readings: float) -> Measurements:
    """``10 us``, the FLOPs at half the peak and KV bytes ``readings`` times, for 32 query and 4 KV heads of 128."""
    grid = [(t, p) for t in 2.0 ** np.arange(6, 13) for p in (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)]
    tokens, past = np.array(grid).T
    flops = 4.0 * 32 * 128 * tokens * (past + (tokens + 1) / 2)
    seconds = 1e-5 + 2 * flops / A100.fp16_flops + readings * 512.0 * 4 * (past + tokens) / A100.mem_bytes_per_s
    columns = {"tokens": tokens, "past_tokens": past, "seconds": seconds}
    columns |= {
        name: np.full(len(tokens), value)
        for name, value in {"batch": 1.0, "query_heads": 32.0, "kv_heads": 4.0, "head_dim": 128.0}.items()
    }
    table = Table(op=MeasuredOp.PREFILL_ATTENTION, kernel="made up", columns=columns)
    return Measurements(gpu=A100.name, provenance=MeasuredBy(tool="a test"), tables=(table,))


def fit(flops_factor: float = 2.0, readings: float = 1.0) -> Fit:
    piece = Piece(fixed_s=1e-5, flop_s=flops_factor / A100.fp16_flops, byte_s=readings / A100.mem_bytes_per_s)
    provenance = Provenance(source=Source.FITTED, origin="a test")
    return Fit(op=Op.PREFILL_ATTENTION, pieces=(piece,), provenance=provenance)


def test_the_charge_that_made_the_chunks_is_the_best_and_is_found_when_fitted() -> None:
    once, fitted, nothing = over_past(chunks(1.0), A100, fit()).charges
    assert once.mape < 0.005
    assert fitted.readings == pytest.approx(1.0, rel=0.1)
    assert once.readings == pytest.approx(1.0, rel=0.01)
    assert nothing.readings == 0.0
    assert nothing.mape > 3 * once.mape
    assert once.num_points == fitted.num_points >= 8


def test_an_increment_is_what_a_past_adds_to_the_same_chunk() -> None:
    """Oracle: a fit of the law predicts it; one with three quarters of all slopes predicts three quarters of it."""
    right = over_past(chunks(1.0), A100, fit())
    assert right.increment == pytest.approx(1.0)
    assert right.increment_mape == pytest.approx(0.0, abs=1e-9)
    assert right.num_increments == 7 * 8
    assert over_past(chunks(1.0), A100, fit(1.5, 0.75)).increment == pytest.approx(0.75)
