"""Points that a fit did not see judge it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.measurements import Column, Table
from hetis.profiler.fit import fit_profile, selected_points
from hetis.profiler.fit.errors import MIN_P95, error_stats
from hetis.profiler.fit.pieces import fit_points, split
from hetis.profiler.fit.report import remark
from hetis.solver.profile import FitScope, Op
from tests.profiler.fit.tables import A100, decode_fit, decode_table, of, small_layers


def test_held_out_points_take_no_part() -> None:
    """Held-out times do not affect the coefficients, only the stated error."""
    table = decode_table(noise=0.05)
    points = next(p for p in selected_points([of(table)], A100).points if p.scope.queries_per_group == 4)
    held_out = split(points).judged
    assert 0.1 < held_out.mean() < 0.5
    seconds = table.seconds.copy()
    seconds[held_out] *= 3.0  # all rows of the table are points, in the same order
    spoilt = replace(table, columns={**table.columns, "seconds": seconds})
    assert decode_fit(spoilt).pieces == decode_fit(table).pieces
    errors = [decode_fit(t).provenance.held_out_mape for t in (table, spoilt)]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[1] > 5 * errors[0]


@pytest.mark.parametrize("rows", [12, 20, 48, 192], ids=str)
def test_no_judge_takes_part_in_the_choice_of_pieces(rows: int) -> None:
    points = next(p for p in selected_points([of(decode_table())], A100).points if p.scope.queries_per_group == 4)
    for turn in split(points.kept(np.arange(rows))).turns:
        assert turn.tuning
        assert not any((part & (turn.judged | ~turn.fitted)).any() for part in turn.tuning)


def mixed_table() -> Table:
    """The shape of `decode_table` and three others of few rows, five times as slow, without a fit of their own."""
    main, rare = decode_table(), decode_table(factor=5.0)
    rows = np.flatnonzero(rare.numbers("context_tokens") <= 2048)[::4]
    columns: dict[str, Column] = {}
    for name, column in main.columns.items():
        others = [np.asarray(rare.columns[name])[rows[i::3]] for i in range(3)]
        if name == "kv_heads":
            others = [rare.numbers("query_heads")[rows[i::3]] / q for i, q in enumerate((1, 2, 8))]
        columns[name] = np.concatenate([np.asarray(column), *others])
    return replace(main, columns=columns)


def test_every_held_out_point_is_judged_once_by_the_fit_that_a_plan_would_ask() -> None:
    report = fit_profile([of(mixed_table())], A100).report
    by_queries = {r.scope.queries_per_group: r for r in report.ops}
    assert by_queries.keys() == {None, 4}
    shared, own = by_queries[None], by_queries[4]
    assert own.served.serving == own.serving
    assert own.served.num_fitted == own.num_fitted
    assert 0 < shared.served.serving.num_points < shared.serving.num_points / 4
    judges = (own.serving, shared.served.serving)
    expected = sum(s.mape * s.num_points for s in judges) / sum(s.num_points for s in judges)
    assert report.held_out_mape(Op.DECODE_ATTENTION) == pytest.approx(expected, rel=0.01)
    cells = report.to_data()["by_region"]["decode_attention"].values()
    counted = sum(s.num_points for r in (own, shared) for _, s in r.served.by_region)
    assert sum(cell["num_points"] for cell in cells) == counted < sum(r.held_out.num_points for r in (own, shared))


def test_rows_of_few_query_heads_are_judged_and_not_fitted() -> None:
    """The rows are three times as slow as the fit of more heads predicts, which is two thirds too fast."""
    table = decode_table()
    slow = np.flatnonzero(table.numbers("query_heads") == 8)
    columns: dict[str, Column] = {}
    for name, column in table.columns.items():
        factor = {"query_heads": 0.25, "kv_heads": 0.5, "seconds": 3.0}.get(name, 1.0)  # two query heads of one KV head
        columns[name] = np.concatenate([np.asarray(column), table.numbers(name)[slow] * factor])
    mixed = replace(table, columns=columns)
    alone, both = fit_profile([of(table)], A100), fit_profile([of(mixed)], A100)
    assert decode_fit(mixed).pieces == decode_fit(table).pieces
    assert alone.report.few_heads == ()
    (few,) = both.report.few_heads
    assert (few.op, few.scope) == (Op.DECODE_ATTENTION, FitScope(head_dim=128))  # their shape has no separate fit
    assert 0 < few.small_batch.num_points < few.serving.num_points < len(slow)
    assert few.serving.bias < -0.5


def test_every_point_of_a_small_table_judges_a_fit_that_did_not_see_it() -> None:
    points = small_layers(noise=0.2)
    turns = split(points).turns
    assert len(turns) == 4
    assert (np.sum([turn.judged for turn in turns], axis=0) == 1).all()
    assert not any((turn.judged & turn.fitted).any() for turn in turns)
    found = fit_points(points)
    assert len(found.judges) == 20
    assert found.fitted.all()
    # A point's own wrong time has no more effect on its prediction than on that of a point elsewhere.
    wrong = points.seconds.copy()
    wrong[7] *= 100
    moved = fit_points(replace(points, seconds=wrong)).predicted
    assert moved[7] == found.predicted[7]
    assert (moved != found.predicted).any()


def test_layers_that_share_a_cell_with_the_judges_are_not_fitted() -> None:
    """In a chain of eight layers, three share a cell with the one held out: itself and its neighbours."""
    count, tokens = 8, np.arange(1.0, 31.0)
    base = small_layers()
    shapes = [f"s{i}" for i in range(count) for _ in tokens]
    cells = [frozenset({(float(i), 0.0), (float(i + 1), 0.0)}) for i in range(count) for _ in tokens]
    features = np.tile(base.features[:1], (len(shapes), 1)) * np.linspace(1, 2, len(shapes))[:, None]
    points = replace(
        base,
        features=features,
        seconds=features[:, 2] * 1e-12,
        shapes=shapes,
        cells=cells,
        sizes={"tokens": np.tile(tokens, count)},
    )
    parts = split(points)
    assert len(parts.turns) == len(parts.shapes) == 2
    for turn in parts.turns:
        seen = frozenset().union(*(cells[row] for row in np.flatnonzero(turn.fitted)))
        judge = frozenset().union(*(cells[row] for row in np.flatnonzero(turn.judged)))
        assert not seen & judge
        assert turn.fitted.any()


def test_a_percentile_of_few_points_is_not_stated() -> None:
    few, enough = (error_stats(np.full(n, 1.1), np.ones(n)) for n in (MIN_P95 - 1, MIN_P95))
    assert few.p95 is None
    assert enough.p95 == pytest.approx(0.1)
    assert enough.num_points == MIN_P95


@given(st.integers(MIN_P95, 200), st.floats(1.001, 3.0))
def test_a_95th_percentile_is_not_below_the_median(count: int, top: float) -> None:
    stats = error_stats(np.linspace(1.0, top, count), np.ones(count))
    assert stats.p95 is not None
    assert stats.median <= stats.p95 <= top


@pytest.mark.parametrize(
    ("op", "region", "said"),
    [
        (Op.PREFILL_ATTENTION, "batch >= 64, context 256 to 1,023", "Large batches of short prompts"),
        (Op.PREFILL_ATTENTION, "batch < 4, context 1,024 to 4,095", "most of the error is at batch < 4"),
        (Op.DECODE_ATTENTION, "batch 4 to 15, context 4,096 to 16,384", "one SM reads the KV"),
        (Op.DECODE_ATTENTION, "batch >= 64, context 1,024 to 4,095", "most of the error is at batch >= 64"),
        (Op.DECODE_ATTENTION, "batch < 4, context 1,024 to 4,095", ""),  # not in the serving range
    ],
)
def test_a_miss_is_explained_only_where_its_reason_was_found(op: Op, region: str, said: str) -> None:
    stats = error_stats(np.full(20, 0.5), np.ones(20))
    one = next(one for one in fit_profile([of(decode_table())], A100).report.ops if one.op is Op.DECODE_ATTENTION)
    found = remark(replace(one, op=op, serving=stats, by_region=((region, stats),)))
    assert said in found
    assert ("SM" in found or "Large batches" in found) == (said.startswith(("one SM", "Large")))
