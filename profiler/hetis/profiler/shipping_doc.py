"""Writes docs/profiles.md: how wrong every shipped profile is, and what whole engines say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hetis.formats.measurements import Measurements
from hetis.profiler.fit import FittedProfile
from hetis.profiler.fit.report import FitReport
from hetis.profiler.ranges import error_of
from hetis.profiler.whole_engine import EngineTime, engine_times, mean_error
from hetis.solver.profile import FitScope, Op, Source

_MODEL = "meta-llama/Llama-2-70b-hf"
_INTRODUCTION = """\
# Profiles, and how wrong they are

Made by `make profiles`; do not edit. GPUs without measurements: [profiles-modelled.md](profiles-modelled.md).

A shipped profile is fitted to published tables; operators that nobody measured are modelled and marked so in the file.
Every error here is on points that the fit never saw. **Held out** are a quarter of the shapes as a whole (head counts,
layer sizes; of a scope with fewer than four shapes none) and a sixth of the points of the other shapes, both chosen by
checksums of what was measured, not of the times; of tables under 40 points, a quarter of the points. The number of
pieces is chosen on the fitted points alone, a quarter of them judging what the rest made. The error is predicted /
measured - 1; MAPE, median and 95th percentile are of its absolute value, bias is its mean
(positive: the profile is too slow).

The **serving range** is batch 4 and more over 256 to 16k tokens of context for decode attention, prompts of 256 to
16k tokens for prefill attention, 1 to 8192 tokens for dense layers, 8 KiB to 256 MiB for all-reduce, 1 KiB and more
for transfers.
"""
_SELECTION = """\
## What the fits see

- **Dense** is a whole layer without attention on one rank, on as many tokens as an iteration has: vidur's operators
  added up, and layers of thirteen models at TP 1 to 8 put together from aiconfigurator's grid of matrix products
  (bilinear in n and k between the sizes measured), with elementwise kernels at 80% of the memory bandwidth. A matrix
  that fits the last-level cache is charged the memory's time: in serving it comes from memory, in a benchmark it does
  not.
- **Decode attention** leaves out rows whose KV is under twice the last-level cache and takes more than 2 us to read.
  Kernels were called over and over there, so that they read from the cache (an L40S at 2.8 times its memory
  bandwidth), which serving never does: all weights and the KV of all other layers pass between two calls. Tables that
  were measured with the cache flushed (`cold`, as `hetis-profile run` does) lose nothing.
- **Attention** leaves out ranks of fewer than 4 query heads. A head shape (head size, queries per KV head) with
  60 points has a fit of its own; all shapes of a head size share another one, which serves the rest.
- **All-reduce** takes the fastest library at each size, one fit for each number of GPUs.
- Several sources for one operator: the first counts, in the order of the files in `hetis.profiler.shipping.SOURCES`.
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


def render(results: Mapping[str, FittedProfile], engines: Sequence[Measurements]) -> str:
    """The Markdown text."""
    parts = [_INTRODUCTION, "## Errors in the serving range, on points held out\n", _summary(results), _PAPER]
    parts += [_SELECTION, "## By profile\n"]
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
`hetis.profiler.ranges.error_of`: held-out error of fitted operators; for modelled ones the error of predicting each
measured GPU from all others.
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
                    gpu, op, sum(r.num_fitted for r in mine), sum(r.serving.num_points for r in mine),
                    _percent(report.held_out_mape(op)), _percent(report.held_out_mape(op, one_piece=True)),
                    _percent(bar), "" if bar is None else f"{len(mine) - len(missed)} of {len(mine)}",
                )  # fmt: skip

    return _table(
        ("GPU", "operator", "points fitted", "held out, serving", "MAPE", "one piece", "bar", "fits that keep it"),
        rows(),
    )


def _operators(report: FitReport) -> str:
    counts, errors = ("pieces", "fitted", "held out"), ("MAPE", "median", "p95", "bias", "one piece", "all held out")
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
            for count, reason in r.left_out:
                left_out[r.op, reason] = left_out.get((r.op, reason), 0) + count
    lines += [f"- Left out: {op}: {count:,} rows: {reason}." for (op, reason), count in left_out.items()]
    lines += [f"- Not fitted: {u.op}: {u.origin} ({u.num_rows:,} rows): {u.reason}." for u in report.unfitted]
    modelled = [fit for fit in result.profile.fits if fit.provenance.source is Source.MODELLED]
    measured = {r.op for r in report.ops}
    for fit in modelled:
        others = " for all other shapes" if fit.op in measured else ""
        error = _percent(fit.provenance.held_out_mape) or "not known"
        lines.append(f"- Modelled{others}: {fit.op}{_of(fit.scope)}: expected error {error}.")
    yield "\n".join(lines) + "\n"


def _regions(report: FitReport) -> Iterable[str]:
    """By region over all scopes of an operator that has more than one region."""
    data = report.to_data()["by_region"]
    for op, cells in data.items():
        if len(cells) > 1:
            yield f"{op}, held-out points by region:\n"
            yield _table(
                ("region", "points", "MAPE", "bias"),
                ((name, c["num_points"], _percent(c["mape"]), f"{c['bias']:+.1%}") for name, c in cells.items()),
            )


def _ranges(results: Mapping[str, FittedProfile]) -> str:
    return _table(
        ("GPU", *Op),
        ((gpu, *(_percent(error_of(result.profile).get(op)) for op in Op)) for gpu, result in results.items()),
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
