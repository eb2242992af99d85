"""Writes docs/profiles.md: how wrong every shipped profile is, and what whole engines say."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from hetis.formats.measurements import Measurements
from hetis.profiler.fit import FittedProfile
from hetis.profiler.fit.report import SMALL_BATCH, FitReport, mean_mape
from hetis.profiler.ranges import error_of
from hetis.solver.profile import FitScope, Op, Source
from tools.over_past import OverPast
from tools.whole_engine import EngineTime, engine_times, mean_error

_MODEL = "meta-llama/Llama-2-70b-hf"
_INTRODUCTION = """\
# Profiles, and how wrong they are

Made by `make profiles`; do not edit. GPUs without measurements: [profiles-modelled.md](profiles-modelled.md).

A shipped profile is fitted to published tables; operators that nobody measured are modelled and marked so in the file.
Every error here is on points that the fit never saw, and n counts distinct points: repeated measurements of one shape
and size are one, of their median. Where fits are added up, every point counts once, for the fit that a plan would ask:
points of a head shape with a fit of its own judge that fit there, and the one of all shapes only in its own row under
"By profile". The error is predicted / measured - 1; MAPE, median and 95th percentile are of its absolute value (the
percentile of n >= 20 only), bias is its mean (positive: the profile is too slow).

**Held out** are a quarter of the shapes as a whole (head counts, layer sizes; of a scope with fewer than four shapes
none) and a sixth of the points of the other shapes, chosen by checksums of what was measured, not of the times. The
number of pieces is chosen on the fitted points alone, a quarter of them judging what the rest made. Two exceptions:

- *Tables under 60 points* (all-reduces, small dense tables) are judged whole: in four turns a fit of three quarters
  predicts the fourth, choosing its pieces within its three. The fit shipped is made of all points.
- *Dense layers put together from a grid of matrix products* share its cells with one another, so that holding some
  out hides nothing. A quarter of them judge, each in a turn of its own whose fit sees no layer that uses any cell of
  it. The fit shipped is made of all layers.

The **serving range** is batch 4 and more over 256 to 16k tokens of context for decode attention, prompts of 256 to
16k tokens for prefill attention, 1 to 8192 tokens for dense layers, 8 KiB to 256 MiB for all-reduce, 1 KiB and more
for transfers.
"""
_SELECTION = """\
## What the fits see

- **Dense** is a whole layer without attention on one rank, on as many tokens as an iteration has: layers of thirteen
  models at TP 1 to 8 put together from aiconfigurator's grid of matrix products (bilinear in n and k between the sizes
  measured), with elementwise kernels at 80% of the memory bandwidth; of GPUs without a grid, operators of measured
  layers added up. A matrix that fits the last-level cache is charged the memory's time: in serving it comes from
  memory, in a benchmark it does not.
- **Decode attention** leaves out rows whose KV is under twice the last-level cache and takes more than 2 us to read.
  Kernels were called over and over there, so that they read from the cache (an L40S at 2.8 times its memory
  bandwidth), which serving never does: all weights and the KV of all other layers pass between two calls. Tables that
  were measured with the cache flushed (`cold`, as `hetis-profile run` does) lose nothing by that.
- **Attention** leaves out fewer than 4 query heads, where one sequence leaves most of the GPU idle. A device that is
  given so few (head groups dispatched to it, high TP) is predicted all the same: "Few query heads" has how wrongly. A
  head shape (head size, queries per KV head) with 60 points has a fit of its own; all shapes of a head size share
  another one, which serves the rest.
- **Prefill attention** is fitted in FLOPs, tokens and (token, query head) pairs. The KV of a chunk and of its past is
  charged one reading at the nominal bandwidth, which is given, not fitted (see "Chunks over a past").
- **All-reduce** takes the fastest library at each size, one fit for each number of GPUs.
- Several sources for one operator: the first counts, in the order of the files in `tools.profiles.SOURCES`.
  What the fits say of the others is under "Other sources".
- Points in the serving range count four times as much as others; the fits reach beyond it, to the regions stated in
  each file, outside of which a plan warns.
"""
_ENGINE_WHY = """\
**Where and why it is off.** The engine of that table is a vLLM of 2023 without captured graphs.

- *Token time* is the same on 4 and on 8 GPUs (45 ms on the A100, 30 ms on the H100, at any prompt length and up to
  batch 8), though each GPU reads half the weights. We read that as the host's time, launching about a dozen kernels for
  each of 80 layers. Where the kernels take longer than the host, the prediction is near: A100 at TP 2, 50 ms predicted,
  54 to 57 ms measured at batch 1. The H100's kernels are under the floor at every TP size. The last table has what is
  missing; the cost model charges a host 0.6 ms per step, as engines that replay graphs do.
- *Prompt time* of 512 to 2048 tokens is nearest at TP 2 on the A100 (5% to 11% too fast at batch 1), and too fast by
  more on faster and on more GPUs; prompts of 128 and 256 tokens meet a floor again (about 50 ms on the H100, 65 ms on
  the A100). At 8k tokens and in large batches measured times do not halve from TP 2 to TP 4 to TP 8. No kernel that was
  measured alone explains this: all-reduces at the profile's speed would be under a seventh of these times.
- Nothing was tuned to this table.
"""


def render(results: Mapping[str, FittedProfile], engines: Sequence[Measurements], past: OverPast | None = None) -> str:
    """The Markdown text."""
    parts = [_INTRODUCTION, "## Errors in the serving range, on points held out\n", _summary(results), _PAPER]
    parts += [_SELECTION, "## What the cache took\n", _CACHE, _cache_served(results)]
    parts += ["## Few query heads\n", _FEW_HEADS, _few_heads(results), "## Tables left out\n", _UNUSED]
    if past is not None:
        parts += ["## Chunks over a past\n", *_over_past(past)]
    parts += ["## Other sources\n", _OTHERS, _other_sources(results)]
    parts += ["## By profile\n"]
    for gpu, result in results.items():
        parts += [f"### {gpu}\n", _operators(result.report), *_notes(result), *_regions(result.report)]
    parts += ["## Errors that plans use\n", _RANGES, _ranges(results)]
    times, impossible = engine_times(engines, {gpu: result.profile for gpu, result in results.items()}, _MODEL)
    if times:
        parts += ["## Splitwise's end-to-end table\n", *_engines(times, impossible)]
    return "\n".join(parts)


_PAPER = """\
Hetis (SC'25) reports 93.8% accuracy for compute, an error of 6.2%, and 92.4% to 96.1% for transfers, errors of 3.9% to
7.6%, of its own linear model on its own machines. *One piece* is that form, a single affine function, fitted with the
same care to the same points and judged on the same held-out ones. Decode attention needs no second piece once what a
cache served is left out; dense layers do, at the bend from memory to compute.
"""
_RANGES = """\
`hetis.profiler.ranges.error_of`: of fitted operators the held-out error in the serving range (where under 10 points
are in it, that of all points held out if it is larger); of modelled ones the error of predicting each measured GPU from
every other one.
"""


def _summary(results: Mapping[str, FittedProfile]) -> str:
    def rows() -> Iterable[Sequence[object]]:
        for gpu, result in results.items():
            report = result.report
            for op in dict.fromkeys(r.op for r in report.ops):
                mine = [r for r in report.ops if r.op is op]
                missed = [r for r in mine if not r.meets_bar]
                bar = mine[0].bar
                yield (
                    gpu, op, sum(r.served.num_fitted for r in mine), sum(r.served.serving.num_points for r in mine),
                    _percent(report.held_out_mape(op)), _percent(report.held_out_mape(op, one_piece=True)),
                    _percent(bar), "" if bar is None else f"{len(mine) - len(missed)} of {len(mine)}",
                )  # fmt: skip

    return _table(
        ("GPU", "operator", "points fitted", "n in the serving range", "MAPE", "one piece", "bar", "fits that keep it"),
        rows(),
    )


_OTHERS = """\
What the fits say of sources that they were not made from, in the serving range: other kernels, libraries, years and
hosts. This is how far two benchmarks of one card are apart, which no held-out point of one of them shows. vidur's
layers are whole ones, measured operator by operator: on few tokens those put together from the grid agree; on many,
vidur's older libraries and unfused elementwise kernels take longer.
"""


def _other_sources(results: Mapping[str, FittedProfile]) -> str:
    return _table(
        ("GPU", "operator", "for", "measured by", "n", "MAPE", "median", "bias"),
        (
            (
                gpu, other.op, _scope(other.scope), other.origin, other.serving.num_points,
                _percent(other.serving.mape), _percent(other.serving.median), f"{other.serving.bias:+.1%}",
            )
            for gpu, result in results.items()
            for other in result.report.other_sources
            if other.op not in _ATTENTION or other.scope.queries_per_group in (None, 1, 8)
        ),
    )  # fmt: skip


_ATTENTION = (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION)
_CACHE = """\
Rows of decode attention in the serving range that no fit sees, as a cache may have served them. They are as many as the
cache is large beside the bandwidth: the fits hold for KV of twice the cache and more, which a loaded card reads, and
for what is read within a launch. In between they are not judged: a small batch of short contexts is predicted from
both sides. The regions of these fits begin above the cache, so that a plan whose calls read less says so in a note
(calls within a launch were fitted, and have the note all the same: a region is one range).
"""
_FEW_HEADS = """\
Rows of attention in the serving range with fewer than 4 query heads, which no fit saw, as the fit that a plan would ask
predicts them (decode: without rows that a cache may have served). This is the error for a device that is given one to
three query heads.
"""
_UNUSED = """\
- **All-reduces and transfers between bridged cards.** vidur's hosts named `pairwise_nvlink` join PCIe boards in pairs
  by a bridge, and the catalogue lists none: it knows the card, not what joins two. All-reduces on 2 GPUs and transfers
  there are faster than the PCIe link, hold on no other host, and are not fitted. Those on 4 GPUs cross PCIe, stay below
  its rate, and are; the error stated is that of predicting this one host. On 2 of these cards the modelled all-reduce
  stands, calibrated on hosts that are three times as slow for their link, so that a plan may prefer TP 4 to TP 2 for
  that alone: measure yours (`hetis-profile run`).
- **All-reduces across nodes** (vidur): tensor parallelism stays inside a node.
- **apex_collectives** (microsoft/apex_plus, H100-SXM-80GB) has no importer: its times are whole microseconds, 8 of them
  for the smallest all-reduces, so that rounding alone is up to 6% there; and two finer sources measured all-reduces of
  the same card, of which one is fitted and the other judges.
- **distserve_a100_coefficients** (LLMServe/DistServe) has no importer: it has no times, but coefficients of whole-model
  times (OPT-13B and 66B under two engines, one of them negative), which hide what an operator takes and how well they
  fitted. A profile is of operators, for any model.
- **Fused experts** (aiconfigurator) are not fitted: the cost model prices experts by the dense fit, and
  [profiles-modelled.md](profiles-modelled.md) has how far the modelled one is from these tables.
"""


def _cache_served(results: Mapping[str, FittedProfile]) -> str:
    return _table(
        ("GPU", "for", "rows left out", "share of the serving range"),
        (
            (gpu, _scope(r.scope), f"{rows.num_rows:,}", _percent(rows.serving_share))
            for gpu, result in results.items()
            for r in result.report.ops
            if r.op is Op.DECODE_ATTENTION and r.scope.queries_per_group is None
            for rows in r.left_out
            if rows.reason.startswith("KV under")
        ),
    )


def _few_heads(results: Mapping[str, FittedProfile]) -> str:
    """By GPU and operator, over all fits."""

    def rows() -> Iterable[Sequence[object]]:
        for gpu, result in results.items():
            for op in _ATTENTION:
                mine = [few for few in result.report.few_heads if few.op is op]
                if mine:
                    every, small = [few.serving for few in mine], [few.small_batch for few in mine]
                    count = sum(stats.num_points for stats in every)
                    bias = sum(stats.bias * stats.num_points for stats in every) / count
                    yield (
                        gpu, op, count, _percent(mean_mape(every)), f"{bias:+.1%}",
                        sum(stats.num_points for stats in small), _percent(mean_mape(small)),
                    )  # fmt: skip

    batch = f"batch < {SMALL_BATCH}"
    return _table(("GPU", "operator", "n", "MAPE", "bias", f"n of {batch}", f"MAPE at {batch}"), rows())


def _over_past(past: OverPast) -> Iterable[str]:
    yield _paragraph(
        "vidur's A100 table (a kernel of 2024, 32 query heads and 4 KV heads) is the only one with a past. Its chunks, "
        "fitted with three ways to charge KV and judged on held-out chunks over a past:"
    )
    yield _table(
        ("KV is charged", "points", "MAPE", "bias", "readings at the nominal bandwidth"),
        ((c.charge, c.num_points, _percent(c.mape), f"{c.bias:+.1%}", f"{c.readings:.2g}") for c in past.charges),
    )
    yield _paragraph(
        "So a past costs its FLOPs, and hardly its bytes; a fit to prompts without a past, where KV bytes grow with "
        "tokens, would charge bytes 3 to 40 readings. The shipped A100 fit, made of prompts alone by a newer kernel, "
        f"predicts {past.increment:.2f} times (median) what a past of 512 tokens or more adds to the same chunk in "
        f"that table ({past.num_increments:,} chunks; off by {past.increment_mape:.1%} of the chunk's time on "
        "average). Regions state a past of 0: a plan whose chunks have one says so in a note."
    )


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120) + "\n"


def _operators(report: FitReport) -> str:
    counts, errors = ("pieces", "fitted", "n"), ("MAPE", "median", "p95", "bias", "one piece", "all held out")
    return _table(
        ("operator", "for", *counts, *errors),
        (
            (
                r.op, _scope(r.scope), r.num_pieces, r.num_fitted, r.serving.num_points, _percent(r.serving.mape),
                _percent(r.serving.median), _percent(r.serving.p95), f"{r.serving.bias:+.1%}",
                _percent(r.one_piece.mape), f"{r.held_out.num_points}: {_percent(r.held_out.mape)}",
            )
            for r in report.ops
        ),
    )  # fmt: skip


def _notes(result: FittedProfile) -> Iterable[str]:
    report, lines = result.report, list[str]()
    for r in report.ops:
        if r.remark:
            bar = _percent(r.bar)
            lines.append(f"- Misses {bar}: {r.op}, {_scope(r.scope)} ({_percent(r.serving.mape)}): {r.remark}.")
    origins = dict.fromkeys((r.op, r.origin) for r in report.ops)
    lines += [f"- From: {op}: {origin}." for op, origin in origins]
    left_out: dict[tuple[Op, str], int] = {}
    for r in report.ops:
        if r.scope.queries_per_group is None:
            for rows in r.left_out:
                left_out[r.op, rows.reason] = left_out.get((r.op, rows.reason), 0) + rows.num_rows
    lines += [f"- Left out: {op}: {count:,} rows: {reason}." for (op, reason), count in left_out.items()]
    lines += [f"- {op}: {note}." for op, note in dict.fromkeys((r.op, note) for r in report.ops for note in r.notes)]
    lines += [f"- Not fitted: {u.op}: {u.origin} ({u.num_rows:,} rows): {u.reason}." for u in report.unfitted]
    modelled = [fit for fit in result.profile.fits if fit.provenance.source is Source.MODELLED]
    measured = {r.op for r in report.ops}
    for fit in modelled:
        others = " for all other shapes" if fit.op in measured else ""
        error = _percent(fit.provenance.held_out_mape) or "not known"
        lines.append(f"- Modelled{others}: {fit.op}{_of(fit.scope)}: expected error {error}.")
    yield "\n".join(lines) + "\n"


def _regions(report: FitReport) -> Iterable[str]:
    """By region over all scopes of an operator that has more than one region, every point by the fit for it."""
    data = report.to_data()["by_region"]
    for op, cells in data.items():
        if len(cells) > 1:
            yield f"{op}, held-out points by region:\n"
            yield _table(
                ("region", "points", "MAPE", "bias"),
                ((name, c["num_points"], _percent(c["mape"]), f"{c['bias']:+.1%}") for name, c in cells.items()),
            )


def _ranges(results: Mapping[str, FittedProfile]) -> str:
    ops = [op for op in Op if any(fit.op is op for result in results.values() for fit in result.profile.fits)]
    return _table(
        ("GPU", *ops),
        ((gpu, *(_percent(error_of(result.profile).get(op)) for op in ops)) for gpu, result in results.items()),
    )


def _engines(times: Sequence[EngineTime], impossible: Sequence[EngineTime]) -> Iterable[str]:
    yield f"{_MODEL}, all prompt lengths and batches of the table ({len(times)} medians), NVLink.\n"
    failed = [f"{t.gpu} TP {t.tp}, {t.batch} prompts of {t.prompt_tokens}" for t in impossible if t.phase == "prompt"]
    if failed:
        yield f"Left out, as their prompt times are shorter than the FLOPs take at the peak: {'; '.join(failed)}.\n"
    groups = list(dict.fromkeys((t.gpu, t.tp, t.phase) for t in times))
    rows = []
    for gpu, tp, phase in groups:
        mine = [t for t in times if (t.gpu, t.tp, t.phase) == (gpu, tp, phase)]
        mape, bias = mean_error(mine)
        low, high = min(mine, key=lambda t: t.error), max(mine, key=lambda t: t.error)
        rows.append((gpu, tp, phase, len(mine), _percent(mape), f"{bias:+.1%}", _case(low), _case(high)))
    yield _table(("GPU", "TP", "phase", "points", "MAPE", "bias", "most too fast", "most too slow"), rows)
    yield "Medians at a prompt of 512 (by batch) and at batch 1 (by prompt), milliseconds measured / predicted:\n"
    shown = [t for t in times if t.output_tokens == 128 and (t.prompt_tokens == 512 or t.batch == 1)]
    for phase in ("prompt", "token"):
        cases = sorted({(t.batch, t.prompt_tokens) for t in shown if t.phase == phase})
        found = {(t.gpu, t.tp, t.batch, t.prompt_tokens): t for t in shown if t.phase == phase}
        machines = list(dict.fromkeys((t.gpu, t.tp) for t in shown))
        yield f"{phase} time\n"
        yield _table(
            ("batch", "prompt", *(f"{gpu.split('-')[0]} TP {tp}" for gpu, tp in machines)),
            ((b, p, *(_pair(found.get((gpu, tp, b, p))) for gpu, tp in machines)) for b, p in cases),
        )
    yield _ENGINE_WHY
    yield "What is missing from the predicted token step, milliseconds:\n"
    missing = []
    for gpu, tp, phase in groups:
        if phase == "token":
            gaps = sorted(
                1e3 * (t.measured_s - t.predicted_s) for t in times if (t.gpu, t.tp, t.phase) == (gpu, tp, phase)
            )
            cells = (gaps[len(gaps) // 10], gaps[len(gaps) // 2], gaps[-1 - len(gaps) // 10])
            missing.append((gpu, tp, *(f"{gap:.1f}" for gap in cells)))
    yield _table(("GPU", "TP", "least tenth", "median", "most tenth"), missing)


def _case(time: EngineTime) -> str:
    return f"{time.error:+.0%} (batch {time.batch}, prompt {time.prompt_tokens})"


def _pair(time: EngineTime | None) -> str:
    return "" if time is None else f"{1e3 * time.measured_s:.0f} / {1e3 * time.predicted_s:.0f}"


def _scope(scope: FitScope) -> str:
    parts = []
    if scope.head_dim is not None:
        parts.append(f"head {scope.head_dim}")
        parts.append("any" if scope.queries_per_group is None else f"{scope.queries_per_group} per KV head")
    if scope.tp is not None:
        parts.append(f"{scope.tp} GPUs")
    if scope.weight_bytes is not None:
        parts.append(f"{8 * scope.weight_bytes:g}-bit weights")
    return ", ".join(parts) or "any"


def _of(scope: FitScope) -> str:
    return "" if scope == FitScope() else f" ({_scope(scope)})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
