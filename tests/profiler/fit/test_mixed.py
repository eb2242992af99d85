"""The factor of decode attention beside a chunk: found again, judged on unseen batches, made only where it can be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.formats import catalogue
from hetis.formats.measurements import Column, MeasuredBy, MeasuredOp, Measurements, Table
from hetis.profiler.defaults import profile_text
from hetis.profiler.fit import FittedProfile, fit_profile
from hetis.profiler.fit.mixed import fit_mixed, mixed_points
from hetis.profiler.fit.pieces import split
from hetis.profiler.fit.points import MIN_DISTINCT, MixedRows
from hetis.profiler.plausibility import parts_of, work_of
from hetis.solver.profile import Fit, FitScope, Op, Piece, Provenance, Source

A100 = catalogue.find_gpu("A100-SXM-80GB").gpu
CHUNKS, PASTS, BATCHES, CONTEXTS = (128, 512, 1024), (0, 4096), (4, 16, 64), (256, 1024, 4096)
FLOP_S, BYTE_S = 1 / 1e14, 2e-12  # far from the peaks, so that no factor makes batches impossible


def table(op: MeasuredOp, rows: list[tuple[float, ...]], names: tuple[str, ...], seconds: np.ndarray | None) -> Table:
    columns: dict[str, Column] = dict(zip(names, np.array(rows, dtype=np.float64).T, strict=True))
    columns["seconds"] = np.ones(len(rows)) if seconds is None else seconds
    return Table(op=op, kernel="made up", cold=True, columns=columns)


def seconds_of(part: Table) -> np.ndarray:
    """Return 10 us and the time of all FLOPs, or of all bytes and 2 ns for each head."""
    work = work_of(part)
    if part.op is MeasuredOp.PREFILL_ATTENTION:
        return 1e-5 + FLOP_S * work.flops
    return 1e-5 + BYTE_S * work.num_bytes + 2e-9 * part.numbers("batch") * part.numbers("query_heads")


def tables(
    *factors: tuple[int, float], alone: bool = True, noise: float = 0.0, contexts: tuple[int, ...] = CONTEXTS
) -> tuple[Table, Table, Table]:
    """Return decode, prefill and mixed attention: ``P + R D`` with an R for each number of queries per group.

    If not ``alone``, no part of a mixed batch was measured with exactly these sizes.
    """
    shapes = [(heads, heads / queries, 128) for queries, _ in factors for heads in (16, 32, 64)]
    heads = ("query_heads", "kv_heads", "head_dim")
    moved = 0 if alone else 1
    decode = table(
        MeasuredOp.DECODE_ATTENTION,
        [(b, c + moved, *s) for b in (1, *BATCHES) for c in (128, *contexts, 8192) for s in shapes],
        ("batch", "context_tokens", *heads),
        None,
    )
    prefill = table(
        MeasuredOp.PREFILL_ATTENTION,
        [(1, t + moved, p, *s) for t in (64, *CHUNKS, 2048) for p in PASTS for s in shapes],
        ("batch", "tokens", "past_tokens", *heads),
        None,
    )
    mixed = table(
        MeasuredOp.MIXED_ATTENTION,
        [(t, p, b, c, *s) for t in CHUNKS for p in PASTS for b in BATCHES for c in contexts for s in shapes],
        ("tokens", "past_tokens", "batch", "context_tokens", *heads),
        None,
    )
    chunk_s, decode_s = (seconds_of(part) for part in parts_of(mixed))
    queries = mixed.numbers("query_heads") / mixed.numbers("kv_heads")
    factor = np.array([dict(factors)[int(q)] for q in queries])
    error = np.exp(noise * np.random.default_rng(1).standard_normal(len(mixed)))
    return (
        timed(decode, seconds_of(decode)),
        timed(prefill, seconds_of(prefill)),
        timed(mixed, (chunk_s + factor * decode_s) * error),
    )


# What it predicts takes no part where everything was measured alone.
ANY_FIT = Fit(
    op=Op.DECODE_ATTENTION,
    pieces=(Piece(fixed_s=1.0),),
    provenance=Provenance(source=Source.FITTED, origin="a test"),
    scope=FitScope(head_dim=128, queries_per_group=4),
)


def rows_for(decode: Table, prefill: Table, mixed: Table) -> MixedRows:
    return MixedRows(origin="a test", table=mixed, decode=decode, prefill=(prefill,))


def timed(old: Table, seconds: np.ndarray) -> Table:
    return replace(old, columns={**old.columns, "seconds": seconds})


def rows_of(old: Table, rows: np.ndarray) -> Table:
    columns: dict[str, Column] = {name: column[rows] for name, column in old.columns.items()}
    return replace(old, columns=columns)


def fitted(*found: Table) -> FittedProfile:
    measured = Measurements(gpu=A100.name, provenance=MeasuredBy(tool="a test"), tables=found)
    return fit_profile([measured], A100)


def factors_of(result: FittedProfile) -> dict[int | None, float | None]:
    """Return the factor of each fit of decode attention by its queries per group."""
    fits = [fit for fit in result.profile.fits if fit.op is Op.DECODE_ATTENTION and fit.scope.head_dim]
    return {fit.scope.queries_per_group: fit.mixed.factor if fit.mixed else None for fit in fits}


@pytest.mark.parametrize("alone", [True, False], ids=["measured alone", "predicted"])
@pytest.mark.parametrize("factor", [0.4, 0.8, 1.0, 1.99, 4.0])
def test_the_factor_that_made_the_batches_is_found_again(factor: float, alone: bool) -> None:
    result = fitted(*tables((4, factor), alone=alone))
    (report,) = result.report.mixed
    assert report.factor == pytest.approx(factor, abs=0.03)
    assert factors_of(result) == {4: report.factor}
    assert report.held_out.mape < 0.02
    assert report.num_fitted + report.held_out.num_points == len(tables((4, factor))[2])
    if factor == 4.0:
        assert report.summed.mape > 0.2
        assert report.summed.bias < 0


def test_outliers_do_not_move_it_and_noise_is_stated() -> None:
    decode, prefill, mixed = tables((4, 2.0), noise=0.05)
    seconds = mixed.seconds.copy()
    seconds[::10] *= 5.0
    (report,) = fitted(decode, prefill, timed(mixed, seconds)).report.mixed
    assert report.factor == pytest.approx(2.0, rel=0.05)
    assert report.held_out.mape > 0.03


def test_batches_that_are_faster_than_their_chunks_alone_have_a_factor_of_zero() -> None:
    decode, prefill, mixed = tables((4, 1.0))
    small = rows_of(mixed, (mixed.numbers("past_tokens") > 0) & (mixed.numbers("context_tokens") == 256))
    chunk, _ = parts_of(small)
    assert factors_of(fitted(decode, prefill, timed(small, 0.9 * seconds_of(chunk)))) == {4: 0.0}


def test_head_shapes_have_their_own_factors_and_share_one_by_head_size() -> None:
    result = fitted(*tables((4, 1.5), (8, 3.0)))
    factors = factors_of(result)
    assert (factors[4], factors[8]) == (pytest.approx(1.5, abs=0.01), pytest.approx(3.0, abs=0.01))
    assert factors[None] is not None
    assert 1.5 <= factors[None] <= 3.0
    assert len(result.report.mixed) == 3


def test_a_head_shape_without_its_own_fit_has_the_shared_factor() -> None:
    decode, prefill, mixed = tables((4, 2.0), (8, 2.0))
    few = decode.numbers("query_heads") / decode.numbers("kv_heads") == 4
    few |= np.arange(len(decode)) % 4 == 0
    assert factors_of(fitted(rows_of(decode, few), prefill, mixed)).keys() == {None, 4}
    assert factors_of(fitted(rows_of(decode, few), prefill, mixed))[None] == pytest.approx(2.0, abs=0.03)


def test_without_mixed_batches_there_is_no_factor() -> None:
    decode, prefill, _ = tables((4, 2.0))
    result = fitted(decode, prefill)
    assert factors_of(result) == {4: None}
    assert result.report.mixed == ()
    assert result.report.to_data()["mixed"] == []
    assert "mixed" not in profile_text(result.profile)


def test_the_rest_of_the_profile_does_not_depend_on_mixed_batches() -> None:
    decode, prefill, mixed = tables((4, 2.0))
    without, profile = fitted(decode, prefill).profile, fitted(decode, prefill, mixed).profile
    assert replace(profile, fits=tuple(replace(fit, mixed=None) for fit in profile.fits)) == without


def test_another_kernel_s_batches_give_no_factor_and_the_report_says_why() -> None:
    decode, prefill, mixed = tables((4, 2.0))
    result = fitted(decode, prefill, replace(mixed, kernel="another"))
    assert factors_of(result) == {4: None}
    (left,) = result.report.unfitted
    assert (left.op, left.num_rows, left.origin) == (Op.DECODE_ATTENTION, len(mixed), "a test, another")
    assert left.reason == "mixed batches: the decode attention of their source and kernel is not fitted"


def test_another_source_s_batches_give_no_factor() -> None:
    first, second = (
        Measurements(gpu=A100.name, provenance=MeasuredBy(tool=tool), tables=tables((4, 2.0))[:count])
        for tool, count in (("a test", 2), ("another", 3))
    )
    assert factors_of(fit_profile([first, second], A100)) == {4: None}
    assert factors_of(fit_profile([second, first], A100)) == {4: pytest.approx(2.0, abs=0.01)}


def test_fewer_points_than_any_fit_needs_give_no_factor() -> None:
    decode, prefill, mixed = tables((4, 2.0))
    some = rows_of(mixed, np.arange(MIN_DISTINCT))
    assert factors_of(fitted(decode, prefill, some)) == {4: pytest.approx(2.0, abs=0.01)}
    repeated = rows_of(mixed, np.arange(len(mixed)) % (MIN_DISTINCT - 1))
    result = fitted(decode, prefill, repeated)
    assert factors_of(result) == {4: None}
    assert [left.reason for left in result.report.unfitted] == [
        "mixed batches: no fitted head shape has 8 distinct points in the serving range"
    ]


def test_only_the_serving_range_counts() -> None:
    decode, prefill, mixed = tables((4, 2.0), contexts=(128, 160, 256, 1024))
    short = mixed.numbers("context_tokens") < 256
    (report,) = fitted(decode, prefill, timed(mixed, np.where(short, 9.0, 1.0) * mixed.seconds)).report.mixed
    assert report.factor == pytest.approx(2.0, abs=0.01)
    assert report.held_out.mape < 0.01
    assert report.num_fitted + report.held_out.num_points == (~short).sum()


def test_batches_whose_kv_a_cache_may_have_served_are_left_out() -> None:
    decode, prefill, mixed = (replace(one, cold=False) for one in tables((4, 2.0)))
    _, part = parts_of(mixed)
    work = work_of(part)
    warm = (work.num_bytes < 80e6) & (work.num_bytes > 2e-6 * A100.mem_bytes_per_s)
    (report,) = fitted(decode, prefill, timed(mixed, np.where(warm, 5.0, 1.0) * mixed.seconds)).report.mixed
    assert report.factor == pytest.approx(2.0, abs=0.01)
    assert report.num_fitted + report.held_out.num_points == (~warm).sum() < len(mixed)


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_rows_changes_no_byte(seed: int) -> None:
    found = tables((4, 1.5), (8, 3.0), noise=0.2)
    random = np.random.default_rng(seed)
    again = [rows_of(one, random.permutation(len(one))) for one in found]
    assert profile_text(fitted(*again).profile) == profile_text(fitted(*found).profile)


def test_held_out_batches_take_no_part() -> None:
    """Nothing but the stated error changes with the times of the batches that judge: the others make the factor."""
    rows = rows_for(*tables((4, 2.0), noise=0.05))
    points = mixed_points(ANY_FIT, rows, [], A100)
    assert points is not None
    assert len(points) == len(rows.table)  # all rows of the table are points, in the same order
    judged = split(points).judged
    assert 0.1 < judged.mean() < 0.3
    spoilt = replace(rows, table=timed(rows.table, np.where(judged, 10.0, 1.0) * rows.table.seconds))
    found, changed = (fit_mixed(ANY_FIT, one, [], A100) for one in (rows, spoilt))
    assert changed[0].factor == found[0].factor
    assert changed[1].held_out.mape > found[1].held_out.mape + 0.1


@given(st.lists(st.floats(-6.0, 6.0), min_size=MIN_DISTINCT, max_size=40), st.floats(0.0, 1.0))
def test_no_other_factor_has_a_smaller_error(logarithms: list[float], share: float) -> None:
    """Of times that follow no law, where fewer than sixty batches make the factor of all of them.

    The error is piecewise linear, with its bends at the factors of single batches: one of them, or a limit, is best.
    """
    decode, prefill, mixed = tables((4, 1.0))
    some = rows_of(mixed, np.arange(len(logarithms)))
    chunk_s, decode_s = (seconds_of(part) for part in parts_of(some))
    seconds = share * chunk_s + decode_s * np.exp(np.array(logarithms))
    found = fit_mixed(ANY_FIT, rows_for(decode, prefill, timed(some, seconds)), [], A100)

    def error(factor: float) -> float:
        return float(np.abs((chunk_s + factor * decode_s) / seconds - 1.0).mean())

    factor = found[0].factor
    least = min(error(other) for other in np.clip((seconds - chunk_s) / decode_s, 0.0, 100.0))
    rounding = 0.006 * factor * float((decode_s / seconds).mean())
    assert error(factor) <= least + rounding + 1e-9
