"""Pools of classes of requests: what they keep beside a plan without, and which class gains or pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import RenderableType
from rich.text import Text

from hetis.planner.report.figures import digits, percent, seconds
from hetis.planner.report.tables import as_group, narrowing_of, section
from hetis.planner.use_cases.record.forms import ClassLatency, KeptWithClasses
from hetis.planner.use_cases.record.parts import Classes
from hetis.solver.plan import Plan

KEPT: tuple[tuple[str, Callable[[KeptWithClasses], str]], ...] = (
    ("'kept in simulation", lambda one: one.traffic),
    ("without classes", lambda one: digits(one.without_rps, 4)),
    ("with", lambda one: digits(one.with_rps, 4)),
    ("gain", lambda one: f"{one.with_rps / one.without_rps - 1.0:+.1%}" if one.without_rps else "all"),
)
LATENCIES: tuple[tuple[str, Callable[[ClassLatency], str]], ...] = (
    ("'class", lambda one: one.name),
    ("prompts up to", lambda one: "any" if one.max_prompt_tokens is None else f"{one.max_prompt_tokens:,}"),
    ("requests", lambda one: percent(one.share)),
    ("limit", lambda one: "none" if one.limit_s is None else seconds(one.limit_s)),
    ("without classes", lambda one: "never" if one.without_s is None else seconds(one.without_s)),
    ("with", lambda one: "never" if one.with_s is None else seconds(one.with_s)),
    ("'who", lambda one: "" if None in (one.without_s, one.with_s) else "pays" if one.pays else "gains"),
)
"""Columns of the tables: headers, those of text preceded by a quote, and what cells show."""


def classes_section(plan: Plan) -> RenderableType | None:
    """Return tables of what a plan keeps with classes and without; None: none were tried."""
    found = Classes.of(plan)
    return section("Classes of requests", _lines(found)) if found.cut else None


@as_group
def _lines(found: Classes) -> Iterator[RenderableType]:
    yield Text(classes_words(found))
    if found.kept:
        yield narrowing_of(found.kept, *KEPT, least=())
    if found.ttft:
        yield Text(latency_words(found))
        yield narrowing_of(found.ttft, *LATENCIES, least=("requests",))


def classes_words(found: Classes) -> str:
    """Return whether pools of classes are used, and the value and bound of plans with them, or why not."""
    if found.why_not or found.value is None:
        return f"not used: cut at {found.cut}; {found.why_not}"
    bound = "" if found.bound is None else f", no plan with them more than {digits(found.bound, 4)}"
    return f"used: cut at {found.cut}; by the model {digits(found.value, 4)}{bound}"


def latency_words(found: Classes) -> str:
    return f"p95 TTFT of each class, in both plans at {digits(found.ttft[0].rate_rps, 4)} requests/s"
