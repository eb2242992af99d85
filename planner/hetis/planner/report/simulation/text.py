"""A simulation on one screen: planned and simulated values, latencies, events, and the use of GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.figures import digits, gigabytes, percent, plural, seconds
from hetis.planner.report.simulation.pictures import model_and_cluster
from hetis.planner.report.tables import as_group, facts, section, table
from hetis.planner.use_cases.grouping import grouped_use
from hetis.planner.use_cases.json_values import document, fields_of, json_value
from hetis.planner.use_cases.record.forms import engine_settings_data
from hetis.planner.use_cases.record.parts import MadeFrom
from hetis.planner.use_cases.service_level import ServiceLevel, limits_of, share_within
from hetis.planner.use_cases.simulation.judging import LevelVerdict, LimitVerdict, simulated_latencies
from hetis.planner.use_cases.simulation.simulate import AGREES, Simulated
from hetis.simulator.arrivals import Arrivals
from hetis.simulator.metrics import Distribution
from hetis.simulator.running import Point, RateSweep
from hetis.simulator.steadiness import MAX_GROWTH, Estimate
from hetis.solver.plan import Objective, Plan

NAMED = 4  # devices named in a sentence


@as_group
def render_simulation(simulated: Simulated, plan: Plan) -> Iterator[RenderableType]:
    verdict, swept, at = simulated.verdict, simulated.sweep, ""
    yield _title(simulated, plan)
    yield facts(_facts(simulated, plan))
    if swept is not None:
        yield section("Rates tried", _points(swept, simulated.verdicts))
        at = f" at {digits(swept.goodput_rps or swept.points[0].rate_rps, 4)} requests/s"
    if verdict is not None and verdict.limits:
        yield section(f"Limits{at}", _limits(verdict, simulated.question.limits))
    yield section("Expected and simulated", _comparison(simulated, plan))
    yield section(f"Latencies{at}", _latencies(simulated))
    yield section("What happened", _events(simulated))
    if simulated.summary.devices:
        yield section("GPUs", _devices(simulated, plan))


def simulation_document(simulated: Simulated, plan: Plan) -> dict[str, Any]:
    """Return all runs and devices as JSON values, with null for missing numbers."""
    question, summary, load = simulated.question, simulated.summary, simulated.question.load
    level, verdict = (None, None) if simulated.verdict is None else (question.service_level, simulated.verdict)
    engine_settings = {**engine_settings_data(question.engine_settings), "changes": question.changes}
    return document(
        "Simulation",
        strategy=plan.strategy,
        load={
            "lengths": load.lengths.name,
            **({"prefix_hit_rate": load.lengths.prefix_hit_rate} if load.lengths.prefix_hit_rate else {}),
            "arrivals": load.arrivals,
            "rate_rps": None if question.sweeps else load.rate_rps,
            "gap_cv": load.gap_cv if load.arrivals is Arrivals.DRAWN else None,
            "requests": question.num_requests,
            "clipped": simulated.num_clipped,
            "seeds": question.seeds,
        },
        settings={name: value for name, value in json_value(question.settings).items() if name != "seed"},
        **({"engine_settings": engine_settings} if question.engine_settings else {}),
        limits={"ttft_s": question.limits.ttft_limit_s, "tpot_s": question.limits.tpot_limit_s},
        service_level=level,
        kept=simulated.kept,
        sure=verdict and verdict.sure,
        verdicts=_verdict_data(verdict),
        missed={} if verdict is None else verdict.missed,
        complete=simulated.complete,
        steady=summary.steady,
        throughput_rps=summary.throughput_rps.value,
        goodput_rps=simulated.sweep and simulated.sweep.goodput_rps,
        planned=simulated.prediction,
        ratios={one.name: one.ratio for one in _compared(simulated)},
        agrees=_agreement(simulated),
        summary=summary,
        runs=simulated.runs,
        sweep=_sweep_data(simulated),
    )


def _sweep_data(simulated: Simulated) -> dict[str, Any] | None:
    if simulated.sweep is None:
        return None
    data: dict[str, Any] = json_value(simulated.sweep)
    points = zip(data["points"], simulated.verdicts, strict=True)
    return {**data, "points": [{**point, "verdicts": _verdict_data(verdict)} for point, verdict in points]}


def _verdict_data(verdict: LevelVerdict | None) -> list[dict[str, Any]]:
    """Return a row for every limit, of which there is none without a verdict."""
    return [
        {
            **fields_of(one, "latency", "statistic", "limit"),
            **fields_of(one.estimate, "value", "half_width"),
            **fields_of(one, "kept", "sure"),
        }
        for one in (() if verdict is None else verdict.limits)
    ]


def level_words(level: ServiceLevel, limits: Objective) -> str:
    """Return a service level in words, without latencies that have no limit."""
    limited = [*limits_of(limits)]
    if level.attainment is None and len(limited) == 1:
        return f"{level.statistic(limited[0])} of {limited[0]} within its limit"
    return str(level)


def service_level_words(simulated: Simulated) -> Text | None:
    """Return whether the service level was kept; None: there is no limit, or no single rate below saturation."""
    verdict, question = simulated.verdict, simulated.question
    if verdict is None or not verdict.limits or simulated.sweep is not None:
        return None
    why = ""
    if verdict.carried is False:
        why = "; the load is not carried" if verdict.steady is False else "; the load does not seem to be carried"
    return Text.assemble(_verdict_word(verdict), f": {level_words(question.service_level, question.limits)}{why}")


def _verdict_word(verdict: LimitVerdict | LevelVerdict) -> Text:
    if verdict.kept is None:
        return Text("not decided", "yellow")
    word = Text("kept", "green") if verdict.kept else Text("MISSED", "bold red")
    return word if verdict.sure else Text.assemble(word, (", unsure", "yellow"))


def _title(simulated: Simulated, plan: Plan) -> Text:
    model, cluster = model_and_cluster(plan)
    lengths = simulated.question.load.lengths
    title = Text.assemble((model, "bold"), " on ", (cluster, "bold"), " under ", (lengths.name, "bold"))
    return title.append(_traffic("", lengths.prefix_hit_rate))


def _facts(simulated: Simulated, plan: Plan) -> list[tuple[str, RenderableType]]:
    question, summary = simulated.question, simulated.summary
    attainment, engines = None, None
    if not math.isnan(summary.attainment) and question.load.arrivals is not Arrivals.SATURATED:
        limits = "both limits" if len(limits_of(question.limits)) == 2 else "the limit"
        attainment = f"{percent(summary.attainment)} of the requests kept {limits}"
    clipped = f"; {simulated.num_clipped:,} requests clipped to the model's context" if simulated.num_clipped else ""
    measured = f"{plural(summary.counts.measured, 'request')} over {seconds(summary.window_s)} per run"
    if question.engine_settings:
        engines = f"started with {question.engine_settings.describe()}: {'; '.join(question.changes)}"
    stopped = "" if simulated.complete else "stopped early: the figures cover only what was simulated"
    every: list[tuple[str, str | Text | None]] = [
        ("Arrivals", _arrivals(simulated)),
        ("Goodput", None if simulated.sweep is None else _goodput(simulated)),
        ("Throughput", _throughput(simulated)),
        ("", Text(_doubt(simulated) or "", "yellow")),
        ("Attainment", attainment),
        ("Service level", service_level_words(simulated)),
        ("Measured", f"{measured}, after {seconds(summary.warm_up_s)} of warm-up{clipped}"),
        ("Settings", ", ".join(_settings(simulated, plan))),
        ("Engines", engines),
        ("", Text(stopped, "yellow")),
    ]
    return [(name, fact) for name, fact in every if fact]


def _throughput(simulated: Simulated) -> Text:
    summary = simulated.summary
    if not math.isfinite(summary.throughput_rps.value):
        return Text("unknown", "yellow")
    tokens = f"{digits(summary.prompt_tokens_per_s)} prompt and {digits(summary.output_tokens_per_s)} output tokens/s"
    return Text.assemble((f"{_with_interval(summary.throughput_rps)} requests/s", "bold green"), f"  {tokens}")


def _settings(simulated: Simulated, plan: Plan) -> Iterator[str]:
    settings, lockstep = simulated.question.settings, sum(one.expert_parallel for one in plan.replicas)
    if lockstep < len(plan.replicas):
        yield "micro-batches apart"
    if lockstep:
        yield "copies that share experts iterate together"
    yield f"{settings.router} router"
    if not settings.dispatch:
        yield "no head-level dispatch"
    elif not settings.redispatch:
        yield "no re-dispatch"
    if settings.faults:
        yield plural(len(settings.faults), "fault")


def _doubt(simulated: Simulated) -> str | None:
    """Return why the figures do not show a sustained load, or None if they do."""
    summary, counts = simulated.summary, simulated.summary.counts
    of = f"{plural(counts.arrived, 'request')}"
    if counts.unfinished:  # a run ends when no further event can happen
        return f"{counts.unfinished:,} of {of} never served: no replica is left to serve them{_gone(simulated)}"
    if not counts.finished and counts.rejected:
        return f"nothing is served: no replica has room for any of the {of}"
    if summary.steady is False and counts.rejected > MAX_GROWTH * counts.arrived:
        return f"not sustained: {counts.rejected:,} of {of} rejected, no replica can hold them"
    if summary.steady is False:
        return "not sustained: requests pile up, latencies grow with the length of the run"
    if not summary.throughput_rps.value > 0:
        return "too short: no request finished before the last one arrived; increase --requests"
    if summary.steady is None and simulated.question.load.arrivals is Arrivals.SATURATED:
        return "too short: the initial requests were not yet replaced by later ones; increase --requests"
    return "too short to tell whether requests pile up; increase --requests" if summary.steady is None else None


def _gone(simulated: Simulated) -> str:
    """Return a clause that names the devices that failed and did not come back."""
    up = {fault.device: fault.joins for fault in simulated.question.settings.faults}  # its last fault decides
    down = sorted(device for device, joins in up.items() if not joins)
    more = f" and {len(down) - NAMED} more" if len(down) > NAMED else ""
    return f"; {', '.join(down[:NAMED])}{more} failed and did not rejoin" if down else ""


def _arrivals(simulated: Simulated) -> str:
    question, load = simulated.question, simulated.question.load
    seeds = plural(len(question.seeds), "seed")
    counts = f"{plural(question.num_requests, 'request')}, {seeds}"
    if load.arrivals is Arrivals.SATURATED:
        return f"saturated: a request is always waiting; {counts}"
    if load.arrivals is Arrivals.RECORDED:
        stretched = f", stretched to {digits(load.rate_rps, 4)} requests/s" if load.rate_rps else ""
        return f"as recorded{stretched}; {counts}"
    kind = {0.0: "evenly spaced", 1.0: "Poisson"}.get(load.gap_cv, f"gamma, gaps with CV {load.gap_cv:g}")
    rate = "" if question.sweeps or load.rate_rps is None else f" at {digits(load.rate_rps, 4)} requests/s"
    return f"{kind}{rate}; {counts}"


def _goodput(simulated: Simulated) -> str:
    found, limits = simulated.sweep, simulated.question.limits
    assert found is not None
    level = simulated.question.service_level
    wanted = [
        f"{latency if level.attainment is not None else f'{level.statistic(latency)} {latency}'} {seconds(limit_s)}"
        for latency, limit_s in limits_of(limits).items()
    ]
    within = f"within {' and '.join(wanted)}" if wanted else "carried"
    if level.attainment is not None:
        within += f" for {100 * level.attainment:g}% of the requests"
    if not found.goodput_rps:
        return f"none: even {digits(found.points[0].rate_rps)} requests/s is not {within}"
    beyond = f"; {digits(found.beyond_rps, 4)} is not" if found.beyond_rps is not None else "; no higher rate was tried"
    return f"{digits(found.goodput_rps, 4)} requests/s {within}{_unsure(found)}{beyond}"


def _unsure(found: RateSweep) -> str:
    """Return a remark if the rate found is not surely within the limits, with the highest one that is."""
    below = [point for point in found.points if point.rate_rps <= found.goodput_rps]
    if below[-1].sure:
        return ""
    sure_rps = max((point.rate_rps for point in below if point.sure), default=None)
    return " (unsure)" if sure_rps is None else f" (unsure above {digits(sure_rps, 4)})"


def _points(swept: RateSweep, verdicts: Sequence[LevelVerdict]) -> Table:
    points = list(zip(swept.points, verdicts, strict=True))
    names = [one.name for one in simulated_latencies(points[0][0].summary, points[0][1])]
    rows: Iterator[tuple[str | Text, ...]] = (
        (
            digits(point.rate_rps, 4),
            digits(point.summary.throughput_rps.value, 4),
            *(_seconds_with_interval(one.estimate) for one in simulated_latencies(point.summary, verdict)),
            percent(point.summary.attainment) if (share := verdict.of(None)) is None else _share(share),
            _point_word(point),
        )
        for point, verdict in points
    )
    return table("requests/s", "served", *names, "attained", "'", rows=rows, fixed=True)


def _point_word(point: Point) -> Text:
    if point.summary.steady is False:
        return Text("not sustained", style="yellow")
    words = "within" if point.within else "misses"
    return Text(words if point.sure else f"{words}, unsure", style="green" if point.within else "yellow")


def _limits(verdict: LevelVerdict, limits: Objective) -> Table:
    made, share = table("'", "limit", "simulated", "'", fixed=True), verdict.of(None)
    for one in verdict.limits:
        of_share = one.latency is None
        name = "Requests within all limits" if of_share else f"{one.latency} {one.statistic}"
        given = f"{100 * one.limit:g}%" if of_share else seconds(one.limit)
        reached = _share(one, with_interval=True) if of_share else _seconds_with_interval(one.estimate)
        made.add_row(name, given, reached, _verdict_word(one))
    if share is not None:
        for latency, limit_s in limits_of(limits).items():
            within = share_within(1.0 - verdict.missed[latency], share.limit)
            made.add_row(f"  {latency} within {seconds(limit_s)}", "", within, "", style="dim")
    return made


def _share(one: LimitVerdict, *, with_interval: bool = False) -> str:
    if not math.isfinite(one.estimate.value):
        return "unknown"
    # 1 - 0.07 is a little below 0.93, which would be rounded down.
    text = share_within(round(one.estimate.value, 12), one.limit)
    if not with_interval or not one.estimate.half_width > 0:
        return text
    return f"{text.removesuffix('%')} ± {digits(100 * one.estimate.half_width, 2)}%"


class _Compared(NamedTuple):
    """A figure that plan and run both have."""

    name: str
    planned: float
    found: Estimate

    @property
    def ratio(self) -> float:
        return self.found.value / self.planned if self.planned and math.isfinite(self.planned) else math.nan


def _compared(simulated: Simulated) -> list[_Compared]:
    """Return the figures that plan and run both have.

    Below saturation a plan promises only to serve what arrives, so its throughput is compared with that.
    """
    summary, planned, load = simulated.summary, simulated.prediction, simulated.question.load
    below = load.arrivals is not Arrivals.SATURATED or simulated.sweep is not None
    expected = min(planned.rate_rps, summary.arrival_rps) if below else planned.rate_rps
    rows = [_Compared("throughput", expected, summary.throughput_rps)]
    if below:
        rows.append(_Compared("ttft_p95", planned.ttft_s, summary.ttft_p95_s))
    if not (summary.counts.measured and math.isnan(summary.tpot_s.mean)):  # requests of one output token have no TPOT
        rows.append(_Compared("tpot_mean", planned.tpot_s, summary.mean_tpot_s))
    return rows


def _agreement(simulated: Simulated) -> bool | None:
    """Return whether throughput is within `AGREES` of the planned value, or None if the run is too short to tell."""
    ratio = _compared(simulated)[0].ratio
    return abs(ratio - 1) <= AGREES if math.isfinite(ratio) and simulated.summary.steady is not None else None


def _comparison(simulated: Simulated, plan: Plan) -> RenderableType:
    throughput, *latencies = _compared(simulated)

    def ratio(of: _Compared) -> str:
        return f"{of.ratio:.3f}" if math.isfinite(of.ratio) else ""

    agrees, found = _agreement(simulated), _with_interval(throughput.found)
    found += "/s" if math.isfinite(throughput.found.value) else ""
    judged = "" if agrees is None else f"{'within' if agrees else 'not within'} {percent(AGREES)}"
    rows = [("Throughput", f"{digits(throughput.planned, 4)}/s", found, ratio(throughput), judged)]
    for one in latencies:
        name = one.name.upper().replace("_P95", " p95").replace("_MEAN", " mean")
        rows.append((name, seconds(one.planned), _seconds_with_interval(one.found), ratio(one), ""))
    made = table("'", "expected", "simulated", "ratio", "'", rows=rows, fixed=True)
    return Group(made, Text(" ".join(_expected_words(simulated, plan)), style="dim"))


def _expected_words(simulated: Simulated, plan: Plan) -> Iterator[str]:
    """Yield what the expected values are."""
    compared, planned_rps = _compared(simulated), simulated.prediction.rate_rps
    if compared[0].planned < planned_rps:
        yield "Expected throughput is the rate at which the measured requests arrived;"
        yield f"saturated, the plan serves {digits(planned_rps, 4)}/s."
    if any(one.name == "tpot_mean" for one in compared):
        yield "The expected TPOT is that of the saturated fleet, the expected TTFT that at the planned utilisation."
    else:
        yield "The expected TTFT is that at the planned utilisation."
    planned_for, lengths = MadeFrom.of(plan).document("workload"), simulated.question.load.lengths
    if "name" in planned_for:
        made_for = _traffic(str(planned_for["name"]), planned_for.get("prefix_hit_rate") or 0.0)
        if made_for != (simulated_for := _traffic(lengths.name, lengths.prefix_hit_rate)):
            yield f"They are those for {made_for}, for which the plan was made, not for {simulated_for}."
    if simulated.question.engine_settings:
        yield "These values are those of the cost model for these GPUs and layers with these engine settings."
    elif more := dict.fromkeys(one.seats for one in plan.replicas if one.seats > one.planned_seats):
        yield f"They are those with all requests that engines may run at once (up to {' or '.join(map(str, more))}),"
        yield "more than the plan's seats, to which the plan's own figures refer."


def _traffic(name: str, hits: float) -> str:
    return f"{name} with {percent(hits)} prefix cache hits" if hits else name


def _latencies(simulated: Simulated) -> Table:
    summary = simulated.summary
    latencies: dict[str, Distribution] = {
        "TTFT": summary.ttft_s,
        "TPOT of a request": summary.tpot_s,
        "End to end": summary.end_to_end_s,
        "  per output token": summary.normalised_s,
        "Queueing": summary.queueing_s,
    }
    rows = ((name, *map(_seconds, (of.mean, of.p50, of.p90, of.p95, of.p99))) for name, of in latencies.items())
    return table("'", "mean", "p50", "p90", "p95", "p99", rows=rows, fixed=True)


def _events(simulated: Simulated) -> Text:
    counts = simulated.summary.counts
    migrations = f"{plural(counts.migrations, 'migration')} ({gigabytes(counts.migrated_bytes)})"
    parts = (
        f"{counts.finished:,} of {plural(counts.arrived, 'request')} finished",
        counts.rejected and f"{counts.rejected:,} rejected: no replica can hold them",
        counts.unfinished and f"{counts.unfinished:,} unfinished",
        plural(counts.preemptions, "preemption"),
        counts.migrations and migrations,
        counts.kv_transfers and plural(counts.kv_transfers, "KV transfer"),
        plural(counts.iterations, "iteration"),
    )
    return Text("; ".join(part for part in parts if part))


def _devices(simulated: Simulated, plan: Plan) -> Table:
    uses = grouped_use(plan, simulated.summary.devices)
    rows = ((use.device, percent(use.kv_mean), percent(use.kv_max), percent(use.busy_mean)) for use in uses)
    return table("'", "KV in use", "highest", "busy", rows=rows, fixed=True)


def _with_interval(estimate: Estimate) -> str:
    if not estimate.half_width >= 0:
        return digits(estimate.value, 4)
    return f"{digits(estimate.value, 4)} ± {digits(estimate.half_width, 2)}"


def _seconds_with_interval(estimate: Estimate) -> str:
    text = _seconds(estimate.value)
    if not estimate.half_width >= 0 or not estimate.value > 0:
        return text
    number, _, unit = text.partition(" ")
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    return f"{number} ± {digits(estimate.half_width * scale, 2)} {unit}"


def _seconds(value_s: float) -> str:
    return seconds(value_s) if math.isfinite(value_s) else "unknown"
