"""A fit recovers the law behind its points, bends with them in the right way, and never uses held-out points."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.formats import catalogue
from hetis.formats.measurements import Column, MeasuredOp, Table
from hetis.formats.positions import parse_text
from hetis.formats.profile import parse_profile
from hetis.profiler.defaults import profile_text
from hetis.profiler.fit import fit_profile
from hetis.profiler.fit.pieces import fit_points
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Op, Source
from tests.profiler.fit.tables import A100, decode_fit, decode_table, noisy, of, small_layers


def reordered(table: Table, order: np.ndarray) -> Table:
    columns: dict[str, Column] = {name: column[order] for name, column in table.columns.items()}
    return replace(table, columns=columns)


def test_the_function_that_made_the_points_is_found_again() -> None:
    """An oracle: both pieces, without noise, to the digits that a fit stores."""
    fitted = fit_profile([of(decode_table())], A100)
    report = next(r for r in fitted.report.ops if r.scope.queries_per_group == 4)
    assert report.num_pieces == 2
    assert report.serving.mape < 0.01
    assert report.one_piece.mape > 2 * report.serving.mape
    assert report.held_out_shapes  # no shape with this number of heads was fitted
    steep = max(decode_fit(decode_table()).pieces, key=lambda piece: piece.byte_s)
    assert (steep.fixed_s, steep.byte_s, steep.head_s) == pytest.approx((1e-5, 6e-13, 2e-9), rel=0.05)


def test_outliers_do_not_move_it() -> None:
    table = decode_table()
    seconds = table.seconds.copy()
    seconds[::25] *= 4.0
    spoilt = decode_fit(replace(table, columns={**table.columns, "seconds": seconds}))
    clean = decode_fit(table)
    for num_bytes, heads in ((1e6, 64), (1e8, 256), (1e9, 2048)):
        assert spoilt.seconds(num_bytes=num_bytes, heads=heads) == pytest.approx(
            clean.seconds(num_bytes=num_bytes, heads=heads), rel=0.05
        )


@settings(max_examples=2, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_rows_changes_no_byte(seed: int) -> None:
    table = decode_table(noise=0.1)
    order = np.random.default_rng(seed).permutation(len(table))
    first, second = (fit_profile([of(t)], A100).profile for t in (table, reordered(table, order)))
    assert profile_text(first) == profile_text(second)


def test_doubling_all_times_doubles_the_fit() -> None:
    once, twice = decode_fit(decode_table(noise=0.1)), decode_fit(decode_table(noise=0.1, factor=2.0))
    for num_bytes, heads in ((1e6, 64), (1e8, 256), (1e9, 2048)):
        times = [fit.seconds(num_bytes=num_bytes, heads=heads) for fit in (once, twice)]
        assert times[1] == pytest.approx(2 * times[0], rel=0.01)


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), st.tuples(st.floats(0, 4e3), st.floats(0, 4e3)))
def test_a_fit_rises_is_convex_and_never_negative(num_bytes: tuple[float, float], heads: tuple[float, float]) -> None:
    fit = noisy()
    (b0, b1), (h0, h1) = num_bytes, heads
    ends = [fit.seconds(num_bytes=b, heads=h) for b, h in ((b0, h0), (b1, h1))]
    middle = fit.seconds(num_bytes=(b0 + b1) / 2, heads=(h0 + h1) / 2)
    assert 0 <= middle <= sum(ends) / 2 * (1 + 1e-9)
    assert fit.seconds(num_bytes=max(b0, b1), heads=max(h0, h1)) >= max(ends)


def test_rows_that_a_cache_served_are_left_out_and_counted() -> None:
    report = fit_profile([of(decode_table(cold=False))], A100).report
    one = next(r for r in report.ops if r.scope.queries_per_group == 4)
    (left_out,) = one.left_out
    assert left_out.num_rows > 20
    assert 0.1 < left_out.serving_share < 0.9
    assert one.num_fitted + one.num_held_out + left_out.num_rows == len(decode_table())
    assert left_out.reason == "KV under twice the cache (40 MB) and above 2 us of the bus"


def test_a_region_begins_above_what_the_cache_took_and_at_the_smallest_row_of_a_cold_table() -> None:
    cold, warm = (decode_fit(decode_table(cold=cold)).region for cold in (True, False))
    assert cold.kv_bytes[0] == 512.0 * 128 * 2
    assert 80e6 <= warm.kv_bytes[0] < 160e6  # the grid doubles
    assert warm.kv_bytes[1] == cold.kv_bytes[1]
    assert warm.outside(batch=8, context_tokens=1024, kv_bytes=20e6) == ("kv_bytes",)


def test_an_impossible_table_is_not_fitted_and_the_report_says_why() -> None:
    with pytest.raises(InvalidProblemError) as caught:
        fit_profile([of(decode_table(factor=0.1))], A100)
    assert "rows whose KV is twice the cache or more imply more than 1.1 times the peaks of A100" in str(caught.value)


def test_measurements_of_another_gpu_are_refused() -> None:
    with pytest.raises(InvalidProblemError) as caught:
        fit_profile([of(decode_table(), gpu="L40S")], A100)
    assert str(caught.value) == "measurements of L40S cannot be fitted to A100-SXM-80GB"


def test_the_profile_has_every_operator_with_its_provenance_and_region() -> None:
    fitted = fit_profile([of(decode_table())], A100)
    assert parse_profile(*parse_text(profile_text(fitted.profile), "p.json")) == fitted.profile
    sources = {fit.op: fit.provenance.source for fit in fitted.profile.fits}
    assert sources[Op.DENSE] is Source.MODELLED
    fit = decode_fit(decode_table())
    assert (fit.provenance.source, fit.provenance.origin) == (Source.FITTED, "a test, made up")
    assert fit.region.context_tokens == (128, 16384)
    assert fit.region.kv_bytes == (512.0 * 128 * 2, 512.0 * 64 * 16384 * 16)
    assert fit.region.outside(batch=128, context_tokens=1000) == ("batch",)
    assert fitted.report.to_data()["held_out_mape"]["decode_attention"] < 0.01


def test_gemms_alone_make_a_dense_fit() -> None:
    """Products of Llama-2-7B on one GPU, at a roofline: the layers together cost as much as their products."""
    sizes = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
    rows = np.array([(m, n, k) for m in np.round(2.0 ** np.arange(0, 12.5, 0.5)) for n, k in sizes])
    m, n, k = rows.T
    seconds = np.maximum(2 * n * k / (0.8 * A100.mem_bytes_per_s), 2 * m * n * k / (0.7 * A100.fp16_flops)) + 3e-6
    columns = {"m": m, "n": n, "k": k, "weight_bits": np.full(len(m), 16.0), "seconds": seconds}
    table = Table(op=MeasuredOp.GEMM, kernel="made up", columns=columns, cold=True)
    fitted = fit_profile([of(table)], A100)
    fit = next(f for f in fitted.profile.fits if f.op is Op.DENSE and f.provenance.source is Source.FITTED)
    params = 202375168.0
    expected = 2 * params * 4096 / (0.7 * A100.fp16_flops)
    got = fit.seconds(flops=2 * params * 4096, num_bytes=2 * params + 16 * 4096 * 4096, tokens=4096)
    assert got == pytest.approx(expected, rel=0.15)


def test_repeated_measurements_count_once_by_their_median() -> None:
    table = decode_table()
    thrice: dict[str, Column] = {name: np.concatenate([column] * 3) for name, column in table.columns.items()}
    seconds = np.concatenate([table.seconds * factor for factor in (1.0, 1.01, 50.0)])
    spoilt = replace(table, columns={**thrice, "seconds": seconds})
    (once,), (more,) = (
        [r for r in fit_profile([of(t)], A100).report.ops if r.scope.queries_per_group == 4] for t in (table, spoilt)
    )
    assert (more.num_fitted, more.num_held_out) == (once.num_fitted, once.num_held_out)
    assert more.serving.mape < 0.02


def test_a_given_coefficient_stays_and_the_others_are_fitted_beside_it() -> None:
    points = small_layers()
    found = fit_points(replace(points, given={"byte_s": 0.4e-12}))
    assert [piece[2] for piece in found.pieces] == [0.4e-12] * len(found.pieces)
    exact = fit_points(replace(points, given={"byte_s": 1e-12}))
    ((fixed_s, flop_s, byte_s),) = exact.pieces
    assert fixed_s == pytest.approx(1e-5, rel=0.01)
    assert (flop_s, byte_s) == (0.0, 1e-12)
    assert exact.predicted == pytest.approx(points.seconds[exact.judges], rel=0.01)


def test_a_gpu_whose_cache_is_not_known_has_a_note() -> None:
    unknown = catalogue.find_gpu("RTX-3090").gpu
    warm, cold = (
        fit_profile([of(decode_table(cold=cold, factor=3.0), gpu=unknown.name)], unknown).report.ops[0]
        for cold in (False, True)
    )
    assert warm.left_out == ()
    assert warm.notes[0].startswith("hetis does not know the last-level cache of RTX-3090")
    assert cold.notes == ()


def test_what_a_second_source_says_is_reported_and_not_fitted() -> None:
    first, second = decode_table(), decode_table(factor=1.25)
    alone, both = fit_profile([of(first)], A100), fit_profile([of(first), of(second)], A100)
    assert both.profile == alone.profile
    (other,) = [other for other in both.report.other_sources if other.scope.queries_per_group == 4]
    assert other.serving.bias == pytest.approx(1 / 1.25 - 1, abs=0.01)
    assert alone.report.other_sources == ()


def test_prefill_is_charged_its_kv_once_whatever_its_table_says() -> None:
    """Without a past, queries cost five readings of the KV each; those of a chunk over a past must not."""
    tokens, heads = (
        grid.ravel() for grid in np.meshgrid(np.round(2.0 ** np.arange(7, 14, 0.5)), (4.0, 8.0, 16.0, 32.0))
    )
    pairs = 4.0 * heads * 128 * tokens * (tokens + 1) / 2
    num_bytes = 512.0 * tokens * heads / 4
    seconds = 1e-5 + pairs / 150e12 + num_bytes / A100.mem_bytes_per_s + 2e-10 * tokens * heads
    columns = {
        "batch": np.ones(len(tokens)),
        "tokens": tokens,
        "past_tokens": np.zeros(len(tokens)),
        "query_heads": heads,
        "kv_heads": heads / 4,
        "head_dim": np.full(len(tokens), 128.0),
        "seconds": seconds,
    }
    table = Table(op=MeasuredOp.PREFILL_ATTENTION, kernel="made up", columns=columns)
    fitted = fit_profile([of(table)], A100)
    fit = next(f for f in fitted.profile.fits if f.op is Op.PREFILL_ATTENTION and f.provenance.source is Source.FITTED)
    (piece,) = fit.pieces
    assert piece.byte_s == pytest.approx(1 / A100.mem_bytes_per_s, rel=0.005)
    assert (piece.fixed_s, piece.flop_s) == pytest.approx((1e-5, 1 / 150e12), rel=0.02)
    assert piece.head_s == pytest.approx(2e-10, rel=0.05)
    assert fit.region.past_tokens == (0, 0)
    assert fit.region.outside(tokens=512, past_tokens=100, kv_bytes=1e12) == ("past_tokens", "kv_bytes")


def prefill_table(rows: int, kernel: str, *, flops: float) -> Table:
    tokens = np.geomspace(256, 16384, rows).round()
    work = 4.0 * tokens * (tokens + 1) / 2 * 32 * 128
    columns = {
        "query_heads": np.full(rows, 32.0),
        "kv_heads": np.full(rows, 8.0),
        "head_dim": np.full(rows, 128.0),
        "batch": np.ones(rows),
        "tokens": tokens,
        "past_tokens": np.zeros(rows),
        "seconds": 1e-5 + work / flops,
    }
    return Table(op=MeasuredOp.PREFILL_ATTENTION, kernel=kernel, columns=columns)


def test_of_one_engines_kernels_the_one_with_most_rows_is_fitted() -> None:
    """A B200's table begins with a thousand rows of a decode kernel, which serves no prompts."""
    corner, serving = prefill_table(20, "corner", flops=20e12), prefill_table(60, "serving", flops=150e12)
    fitted = fit_profile([of(corner, serving)], A100)
    fit = next(f for f in fitted.profile.fits if f.op is Op.PREFILL_ATTENTION and f.provenance.source is Source.FITTED)
    assert "serving" in fit.provenance.origin
    assert fit.pieces[0].flop_s == pytest.approx(1 / 150e12, rel=0.05)
    assert any("corner" in table.origin for table in fitted.report.unfitted)


@pytest.mark.parametrize("name", ["RTX-PRO-6000-Server-96GB", "RTX-4090", "RTX-5090", "B200-SXM-180GB"])
def test_what_a_large_cache_served_is_left_out(name: str) -> None:
    gpu = catalogue.find_gpu(name).gpu
    report = fit_profile([of(decode_table(cold=False, factor=3.0), gpu=name)], gpu).report.ops[0]
    assert report.notes == ()
    assert sum(rows.num_rows for rows in report.left_out) > 0


def test_all_reduces_over_a_bridge_that_the_catalogue_lacks_are_not_fitted() -> None:
    gpu = catalogue.find_gpu("A100-PCIe-80GB").gpu
    num_bytes = np.tile(2.0 ** np.arange(13, 29), 2)
    num_gpus = np.repeat([2.0, 4.0], 16)
    wire_s = 2 * (num_gpus - 1) / num_gpus * num_bytes / gpu.pcie_bytes_per_s
    seconds = 1e-5 + np.where(num_gpus == 2, 0.12, 1.4) * wire_s
    table = Table(
        op=MeasuredOp.ALL_REDUCE,
        kernel="NCCL",
        columns={"num_gpus": num_gpus, "num_bytes": num_bytes, "impl": np.full(32, "NCCL"), "seconds": seconds},
    )
    report = fit_profile([of(table, gpu=gpu.name)], gpu).report
    assert [one.scope.tp for one in report.ops] == [4]
    assert [(one.op, one.num_rows) for one in report.unfitted] == [(Op.ALL_REDUCE, 16)]
    assert "a bridge it does not list" in report.unfitted[0].reason
    assert report.ops[0].notes[0].startswith("measured on a host with bridges between some of its GPUs")
