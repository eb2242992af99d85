"""Fair shares as tables and as a document: amounts, values, envy, and the results of other rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.dispatch import plain_table
from hetis.planner.report.figures import digits, percent
from hetis.planner.report.plan import section
from hetis.planner.use_cases.fair import Sharing
from hetis.solver.placement.tables import FloatArray
from hetis.solver.shares.problem import Rule, Shares, tenant_values
from hetis.solver.shares.properties import Properties

MAX_ENVY = 12  # claimants whose envy is shown as a matrix; -o json has all
MAX_ROUNDS = 20

_RULES = {
    Rule.COOPERATIVE: "the most total value without envy (OEF, cooperative)",
    Rule.NON_COOPERATIVE: "the most total value at equal value per part (OEF, non-cooperative)",
    Rule.MAX_MIN: "the largest least gain over an equal split (Gavel's max-min)",
    Rule.TRADING: "an equal split, then trades of fast for slow GPUs (Gandiva_fair)",
    Rule.EQUAL: "the same part of every GPU type for everybody",
}


def claimant_names(found: Sharing) -> list[str]:
    """Return ``tenant``, or ``tenant/job`` if a tenant has several jobs."""
    return [
        tenant.name if len(tenant.jobs) == 1 else f"{tenant.name}/{job.name}"
        for tenant in found.problem.tenants
        for job in tenant.jobs
    ]


def render_fair(found: Sharing) -> RenderableType:
    """Return the table view, at most 80 columns wide if names and GPU types allow it."""
    return Group(*_sections(found))


def _sections(found: Sharing) -> Iterator[RenderableType]:
    shares, properties = found.shares[0], found.properties[0]
    yield Text.assemble(("shares  ", "bold"), _RULES[shares.rule])
    yield Text.assemble(("value   ", "bold"), _value_line(found, shares))
    for name in found.derived:
        yield Text(f"        speed-ups of {name} come from placements of its model on each GPU type", style="dim")
    yield Text()
    yield _share_table(found, shares, properties)
    yield section("what holds", _property_lines(found, shares, properties))
    if 1 < len(found.problem.weights) <= MAX_ENVY:
        yield section(
            "envy: own value with the other's share, per part, over one's own", _envy_table(found, properties)
        )
    if found.claims:
        yield section("false claims that pay best, of those tried", _claim_table(found))
    yield section("other rules", _rule_table(found))
    if found.rounds:
        yield section("whole GPUs, round after round", _round_table(found))


def _value_line(found: Sharing, shares: Shares) -> str:
    equal = next(answer.value for answer in found.shares if answer.rule is Rule.EQUAL)
    over = f", {shares.value / equal:.3f} times an equal split"
    return f"{digits(shares.value, 4)} GPUs of everybody's slowest type{over}; {_proof(shares)}"


def _proof(shares: Shares) -> str:
    return f"gap {percent(shares.gap)}" if shares.gap != float("inf") else "a procedure, no bound"


def _share_table(found: Sharing, shares: Shares, properties: Properties) -> Table:
    problem = found.problem
    table = plain_table(
        ("tenant", "left"), ("parts", "right"), *((gpu.gpu, "right") for gpu in problem.gpus), ("value", "right"),
        ("over equal", "right"),
    )  # fmt: skip
    values = problem.values(shares.amounts)
    for v, name in enumerate(claimant_names(found)):
        over = properties.over_equal_split[v]
        table.add_row(
            name, digits(problem.weights[v]), *(_amount(x) for x in shares.amounts[v]), digits(values[v]),
            Text(f"{over:.2f}x", style="red" if over < 1.0 - 1e-6 else ""),
        )  # fmt: skip
    table.add_row(
        Text("all", style="dim"), digits(problem.weights.sum()),
        *(f"{_amount(x)}/{gpu.count}" for x, gpu in zip(shares.amounts.sum(axis=0), problem.gpus, strict=True)),
        digits(values.sum()), "",
    )  # fmt: skip
    return table


def _amount(gpus: float) -> str:
    return "·" if gpus < 5e-4 else f"{gpus:.2f}"


def _property_lines(found: Sharing, shares: Shares, properties: Properties) -> Table:
    table = Table.grid(padding=(0, 2))
    names = claimant_names(found)
    worst = properties.envy.max(axis=1)
    envious = [f"{names[v]} ({worst[v]:.2f}x)" for v in range(len(names)) if worst[v] > 1.0 + 1e-6]
    losers = [names[v] for v in range(len(names)) if properties.over_equal_split[v] < 1.0 - 1e-6]
    apart = [names[v] for v in range(len(names)) if not properties.contiguous[v]]
    rows = [
        (not envious, "nobody envies anybody" if not envious else f"envious: {_listed(envious)}"),
        (
            not losers,
            "sharing pays: nobody has less than an equal split is worth"
            if not losers
            else f"worse off than with an equal split: {_listed(losers)}",
        ),
        (
            properties.is_efficient,
            "efficient: nobody can have more without another having less"
            if properties.is_efficient
            else f"{percent(properties.could_gain)} of value could be added with nobody losing any",
        ),
        (
            not apart,
            "everybody's GPU types are adjacent in speed" if not apart else f"types are apart for {_listed(apart)}",
        ),
    ]
    if shares.rule is Rule.NON_COOPERATIVE:
        rows.append((True, "claiming larger speed-ups than one has never pays; claiming smaller ones can"))
    for holds, sentence in rows:
        table.add_row(Text("yes" if holds else "no", style="green" if holds else "yellow"), sentence)
    return table


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _envy_table(found: Sharing, properties: Properties) -> Table:
    names = claimant_names(found)
    table = plain_table(("", "left"), *((name, "right") for name in names))
    for v, name in enumerate(names):
        cells = [
            Text("·" if v == i else f"{x:.2f}", style="red" if x > 1.0 + 1e-6 else "")
            for i, x in enumerate(properties.envy[v])
        ]
        table.add_row(name, *cells)
    return table


def _claim_table(found: Sharing) -> Table:
    table = plain_table(("tenant", "left"), ("claiming more gains", "right"), ("claiming less gains", "right"))
    for name, (more, less) in zip(claimant_names(found), found.claims, strict=True):
        table.add_row(name, percent(more.gain), percent(less.gain))
    return table


def _rule_table(found: Sharing) -> Table:
    table = plain_table(
        ("rule", "left"), ("value", "right"), ("over equal", "right"), ("least over equal", "right"), ("envy", "right"),
        ("proof", "left"),
    )  # fmt: skip
    equal = next(answer.value for answer in found.shares if answer.rule is Rule.EQUAL)
    for answer, properties in zip(found.shares, found.properties, strict=True):
        table.add_row(
            answer.rule.value,
            digits(answer.value, 4),
            f"{answer.value / equal:.3f}x",
            f"{properties.over_equal_split.min():.2f}x",
            f"{properties.envy.max():.2f}x",
            Text(_proof(answer), style="dim"),
        )
    return table


def _round_table(found: Sharing) -> Table:
    problem = found.problem
    table = plain_table(("round", "right"), *((name, "left") for name in claimant_names(found)))
    for i, one in enumerate(found.rounds[:MAX_ROUNDS]):
        cells = []
        for v in range(len(problem.weights)):
            parts = [f"{n} {gpu.gpu}" for n, gpu in zip(one.granted[v], problem.gpus, strict=True) if n]
            cells.append(" + ".join(parts) if parts else Text("waits" if v in one.waiting else "-", style="dim"))
        table.add_row(str(i + 1), *cells)
    if len(found.rounds) > MAX_ROUNDS:
        table.add_row("...", f"{len(found.rounds) - MAX_ROUNDS} more in -o json")
    return table


def fair_document(found: Sharing) -> dict[str, Any]:
    """Return everything as plain data."""
    problem = found.problem
    gpus = [gpu.gpu for gpu in problem.gpus]
    document: dict[str, Any] = {
        "gpus": {gpu.gpu: gpu.count for gpu in problem.gpus},
        "claimants": [
            {
                "tenant": tenant.name,
                "job": job.name,
                "weight": float(problem.weights[v]),
                "speedups": dict(zip(gpus, problem.speedups[v].tolist(), strict=True)),
            }
            for v, (tenant, job) in enumerate((tenant, job) for tenant in problem.tenants for job in tenant.jobs)
        ],
        "rules": [
            _rule_document(found, answer, properties)
            for answer, properties in zip(found.shares, found.properties, strict=True)
        ],
    }
    if found.rounds:
        document["rounds"] = [
            {"granted": one.granted.tolist(), "owed": one.owed.tolist(), "waiting": list(one.waiting)}
            for one in found.rounds
        ]
    if found.claims:
        document["claims"] = [
            {"inflated": _claim(more), "deflated": _claim(less)} for more, less in found.claims
        ]  # fmt: skip
    return document


def _claim(claim: Any) -> dict[str, Any]:
    return {"factors": list(claim.factors), "gain": claim.gain}


def _plain(numbers: FloatArray) -> Any:
    """Return lists without negative zeros, which solvers return and JSON would keep."""
    return (numbers + 0.0).tolist()


def _rule_document(found: Sharing, answer: Shares, properties: Properties) -> dict[str, Any]:
    bounded = answer.bound != float("inf")
    return {
        "rule": answer.rule.value,
        "value": answer.value,
        "bound": answer.bound if bounded else None,
        "gap": answer.gap if bounded else None,
        "shares": _plain(answer.amounts),
        "values": _plain(found.problem.values(answer.amounts)),
        "tenant_values": _plain(tenant_values(found.problem, answer.amounts)),
        "envy": _plain(properties.envy),
        "over_equal_split": _plain(properties.over_equal_split),
        "unused_gpus": _plain(properties.unused),
        "could_gain": properties.could_gain,
        "envy_free": properties.is_envy_free,
        "sharing_incentive": properties.has_sharing_incentive,
        "efficient": properties.is_efficient,
        "contiguous": properties.contiguous.tolist(),
    }
