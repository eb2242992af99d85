"""Pools of classes of requests: what they keep beside a plan without, and which class gains or pays."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from hetis.planner.report.figures import digits, percent, seconds
from hetis.planner.report.tables import as_group, narrowing, section
from hetis.planner.use_cases.record.forms import ClassLatency, KeptWithClasses
from hetis.planner.use_cases.record.parts import Classes
from hetis.solver.plan import Plan


def classes_section(plan: Plan) -> RenderableType | None:
    """Return tables of what a plan keeps with classes and without; None: none were tried."""
    found = Classes.of(plan)
    return section("Classes of requests", _lines(found)) if found.cut else None


@as_group
def _lines(found: Classes) -> Iterator[RenderableType]:
    yield Text(f"{'not used' if found.why_not else 'used'}: cut at {found.cut}{_why(found)}")
    if found.kept:
        rows = [_kept(one) for one in found.kept]
        yield narrowing("<kept in simulation", "without classes", "with", "gain", rows=rows, least=())
    if found.ttft:
        yield Text(f"p95 TTFT of each class, in both at {digits(found.ttft[0].rate_rps, 4)} requests/s")
        heads = ("<class", "prompts up to", "requests", "limit", "without classes", "with", "'who")
        yield narrowing(*heads, rows=[_latency(one) for one in found.ttft], least=("requests",))


def _why(found: Classes) -> str:
    if found.why_not or found.value is None:
        return f"; {found.why_not}" if found.why_not else ""
    bound = "" if found.bound is None else f", no plan with them more than {digits(found.bound, 4)}"
    return f"; by the model {digits(found.value, 4)}{bound}"


def _kept(one: KeptWithClasses) -> list[RenderableType]:
    gain = f"{one.with_rps / one.without_rps - 1.0:+.1%}" if one.without_rps else "all"
    style = "green" if one.with_rps > one.without_rps else "red"
    return [one.traffic, digits(one.without_rps, 4), digits(one.with_rps, 4), Text(gain, style=style)]


def _latency(one: ClassLatency) -> list[RenderableType]:
    most = "any" if one.max_prompt_tokens is None else f"{one.max_prompt_tokens:,}"
    who = Text("")
    if one.without_s is not None and one.with_s is not None:
        who = Text("gains", style="green") if one.with_s <= one.without_s else Text("pays", style="red")
    times = ["none" if value is None else seconds(value) for value in (one.limit_s, one.without_s, one.with_s)]
    return [one.name, most, percent(one.share), *times, who]
