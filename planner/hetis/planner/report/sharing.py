"""GPUs or fleets shared among tenants, as tables and as documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import permutations
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.figures import digits, percent
from hetis.planner.report.tables import as_group, grid, section, table, table_of
from hetis.planner.use_cases.grouping import gpu_counts, used_counts
from hetis.planner.use_cases.json_values import fields_of, json_value
from hetis.planner.use_cases.sharing import SharedFleet, Sharing
from hetis.solver.placement.replicas.tables import FloatArray
from hetis.solver.shares.properties import Properties, Round
from hetis.solver.shares.share_problem import FairnessRule, Shares, tenant_values
from hetis.solver.tenants.tenancy import FleetShares, TenantRule

EPSILON = 1e-6
MAX_ENVY = 12  # claimants up to which envy is shown as a matrix; -o json has all
MAX_ROUNDS = 20
_MOST_DECIMALS = 4  # of per cent: as fine as EPSILON

_RULES = {
    FairnessRule.COOPERATIVE: "the most total value without envy (OEF, cooperative)",
    FairnessRule.NON_COOPERATIVE: "the most total value with equal value per part (OEF, non-cooperative)",
    FairnessRule.MAX_MIN: "the largest minimum gain over an equal split (Gavel's max-min)",
    FairnessRule.TRADING: "an equal split, then trades of fast for slow GPUs (Gandiva_fair)",
    FairnessRule.EQUAL: "the same share of every GPU type for each tenant",
}


def claimant_names(found: Sharing) -> list[str]:
    """Return each claimant's name: ``tenant``, or ``tenant/job`` if a tenant has several jobs."""
    return [
        tenant.name if len(tenant.jobs) == 1 else f"{tenant.name}/{job.name}"
        for tenant in found.problem.tenants
        for job in tenant.jobs
    ]


def _headed(*lines: tuple[str, RenderableType]) -> Table:
    """Return lines, each after its heading, with hanging indents."""
    return grid(False, True, rows=((Text(heading, style="bold"), line) for heading, line in lines))


def _times(ratio: float) -> Text:
    """Return how many times as much as without sharing a tenant has, in red if it is less."""
    return Text(f"{ratio:.2f}x" if math.isfinite(ratio) else "-", style="red" if ratio < 1.0 - EPSILON else "")


def _envy_table(names: Sequence[str], envy: Iterable[Iterable[float]]) -> Table:
    """Return a table of each tenant's envy of every other tenant, in red if there is any."""

    def cell(v: int, i: int, x: float) -> Text:
        return Text("·" if v == i else f"{x:.2f}", style="red" if i != v and x > 1.0 + EPSILON else "")

    rows = ([Text(names[v]), *(cell(v, i, x) for i, x in enumerate(row))] for v, row in enumerate(envy))
    return table("'", *names, rows=rows)


# --- GPUs by the hour: fair shares of every type


@as_group
def render_fair(found: Sharing) -> Iterator[RenderableType]:
    shares, properties, equal = found.shares[0], found.properties[0], _equal_value(found)
    derived = (f"speed-ups of {name} come from placements of its model on each GPU type" for name in found.derived)
    value = (
        f"{digits(shares.value, 4)} GPUs of each tenant's slowest type, {shares.value / equal:.3f} times an equal split"
    )
    yield _headed(
        ("shares", _RULES[shares.rule]),
        ("value", f"{value}; {_proof(shares)}"),
        *(("", Text(line, style="dim")) for line in derived),
    )
    yield Text()
    yield _share_table(found, shares, properties)
    yield section("properties", _property_lines(found, shares, properties))
    if 1 < len(found.problem.weights) <= MAX_ENVY:
        title = "envy: own value with the other's share, per part, over one's own"
        yield section(title, _envy_table(claimant_names(found), properties.envy))
    if found.claims:
        claims = zip(claimant_names(found), found.claims, strict=False)  # fewer claims if they were stopped
        rows = ((name, percent(more.gain), percent(less.gain)) for name, (more, less) in claims)
        made = table("'tenant", "overstating gains", "understating gains", rows=rows)
        yield section("most profitable false claims among those tried", made)
    yield section("other rules", _rule_table(found))
    if found.rounds:
        yield section("whole GPUs, by round", _round_table(found))


def _equal_value(found: Sharing) -> float:
    return next(answer.value for answer in found.shares if answer.rule is FairnessRule.EQUAL)


def _proof(shares: Shares) -> str:
    return f"gap {percent(shares.gap)}" if math.isfinite(shares.gap) else "a heuristic, without a bound"


def _share_table(found: Sharing, shares: Shares, properties: Properties) -> Table:
    problem, values = found.problem, found.problem.values(shares.amounts)
    rows: list[tuple[RenderableType, ...]] = [
        (
            name,
            digits(problem.weights[v]),
            *map(_amount, shares.amounts[v]),
            digits(values[v]),
            _times(properties.over_equal_split[v]),
        )
        for v, name in enumerate(claimant_names(found))
    ]
    given = (f"{_amount(x)}/{gpu.count}" for x, gpu in zip(shares.amounts.sum(axis=0), problem.gpus, strict=True))
    rows.append((Text("all", style="dim"), digits(problem.weights.sum()), *given, digits(values.sum()), ""))
    return table("'tenant", "parts", *(gpu.gpu for gpu in problem.gpus), "value", "over equal", rows=rows)


def _amount(gpus: float) -> str:
    return "·" if gpus < 5e-4 else f"{gpus:.2f}"


def _property_lines(found: Sharing, shares: Shares, properties: Properties) -> Table:
    names, worst = claimant_names(found), properties.envy.max(axis=1)
    envious = [f"{name} ({worst[v]:.2f}x)" for v, name in enumerate(names) if worst[v] > 1.0 + EPSILON]
    losers = [name for v, name in enumerate(names) if properties.over_equal_split[v] < 1.0 - EPSILON]
    apart = [name for v, name in enumerate(names) if not properties.contiguous[v]]
    could_gain = percent(properties.could_gain)
    # Whether a property holds, what it is, and what is instead.
    rows = [
        (not envious, "no tenant envies another", f"envious: {_listed(envious)}"),
        (
            not losers,
            "sharing pays: every tenant has at least the value of an equal split",
            f"worse off than with an equal split: {_listed(losers)}",
        ),
        (
            properties.is_efficient,
            "efficient: no tenant can gain unless another loses",
            f"{could_gain} of value could be added at no tenant's expense",
        ),
        (
            not apart,
            "every tenant's GPU types are adjacent in speed",
            f"GPU types are not adjacent in speed for {_listed(apart)}",
        ),
    ]
    if shares.rule is FairnessRule.NON_COOPERATIVE:
        rows.append((True, "overstating speed-ups never pays; understating them can", ""))
    yes, no = Text("yes", style="green"), Text("no", style="yellow")
    return grid(True, True, rows=((yes, so) if holds else (no, otherwise) for holds, so, otherwise in rows))


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _rule_table(found: Sharing) -> RenderableType:
    equal = _equal_value(found)
    return table_of(
        zip(found.shares, found.properties, strict=True),
        ("'rule", lambda one: one[0].rule.value),
        ("value", lambda one: digits(one[0].value, 4)),
        ("over equal", lambda one: f"{one[0].value / equal:.3f}x"),
        ("least over equal", lambda one: f"{one[1].over_equal_split.min():.2f}x"),
        ("envy", lambda one: f"{one[1].envy.max():.2f}x"),
        ("'proof", lambda one: Text(_proof(one[0]), style="dim")),
    )


def _round_table(found: Sharing) -> RenderableType:
    def granted(v: int) -> Callable[[tuple[int, Round]], str | Text]:
        def cell(one: tuple[int, Round]) -> str | Text:
            parts = [f"{n} {gpu.gpu}" for n, gpu in zip(one[1].granted[v], found.problem.gpus, strict=True) if n]
            return " + ".join(parts) or Text("waits" if v in one[1].waiting else "-", style="dim")

        return cell

    columns = [(f"'{name}", granted(v)) for v, name in enumerate(claimant_names(found))]
    rounds = enumerate(found.rounds, start=1)
    return table_of(rounds, ("round", lambda one: f"{one[0]}"), *columns, most=MAX_ROUNDS, noun="round")


def fair_document(found: Sharing) -> dict[str, Any]:
    problem = found.problem
    gpus = [gpu.gpu for gpu in problem.gpus]
    every = [(tenant, job) for tenant in problem.tenants for job in tenant.jobs]
    document: dict[str, Any] = {
        "gpus": {gpu.gpu: gpu.count for gpu in problem.gpus},
        "claimants": [
            {
                "tenant": tenant.name,
                "job": job.name,
                "weight": float(problem.weights[v]),
                "speedups": dict(zip(gpus, problem.speedups[v].tolist(), strict=True)),
            }
            for v, (tenant, job) in enumerate(every)
        ],
        "rules": [_rule(found, *answer) for answer in zip(found.shares, found.properties, strict=True)],
    }
    if found.rounds:
        document["rounds"] = [
            {"granted": one.granted.tolist(), "owed": one.owed.tolist(), "waiting": one.waiting} for one in found.rounds
        ]
    if found.claims:
        document["claims"] = [{"inflated": more, "deflated": less} for more, less in found.claims]
    return {name: json_value(value) for name, value in document.items()}


def _rule(found: Sharing, answer: Shares, properties: Properties) -> dict[str, Any]:
    def plain(numbers: FloatArray) -> Any:
        return (numbers + 0.0).tolist()  # without negative zeros, which solvers return and JSON would keep

    return {
        **fields_of(answer, "rule", "value", "bound", "gap"),
        "shares": plain(answer.amounts),
        "values": plain(found.problem.values(answer.amounts)),
        "tenant_values": plain(tenant_values(found.problem, answer.amounts)),
        "envy": plain(properties.envy),
        "over_equal_split": plain(properties.over_equal_split),
        "unused_gpus": plain(properties.unused),
        "could_gain": properties.could_gain,
        "envy_free": properties.is_envy_free,
        "sharing_incentive": properties.has_sharing_incentive,
        "efficient": properties.is_efficient,
        "contiguous": properties.contiguous.tolist(),
    }


# --- a fleet: a plan for every tenant


MAX_TENANTS = 8  # tenants up to which envy is shown as a matrix; -o json has all

_TENANT_RULES = {
    TenantRule.EFFICIENCY: "the most total value, however it is divided",
    TenantRule.EQUAL_THROUGHPUT: "for each tenant the same share of its rate alone, per part",
    TenantRule.MAX_MIN: "the highest possible minimum share of the rate alone, then value",
    TenantRule.SHARING_INCENTIVE: "every tenant at least at the rate of its own part of the fleet, then value",
}


@as_group
def render_tenants(found: SharedFleet) -> Iterator[RenderableType]:
    answer = found.answers[0]
    head = [
        ("rule", f"{answer.rule}: {_TENANT_RULES[answer.rule]}"),
        ("value", f"{digits(answer.value, 4)}, {_at_most(digits(answer.bound, 4), answer.gap)}"),
    ]
    if answer.level_bound is not None:
        most = _at_most(f"{answer.level_bound:.1%}", answer.level_gap)
        head.append(("least", f"{answer.level:.1%} of its rate alone per part, {most}"))
    yield _headed(*head)
    yield Text()
    yield _tenant_table(answer)
    yield section("GPUs", _gpu_table(answer))
    yield section("properties", Group(*(Text(f" {line}") for line in holds(found))))
    if found.envy is not None and 1 < len(answer.shares) <= MAX_TENANTS:
        title = "envy: own rate with as many GPUs as the other, per part, over one's own"
        yield section(title, _envy_table([share.name for share in answer.shares], envies(found)))
    if len(found.answers) > 1:
        yield section("rules compared", _tenant_rule_table(found))


def _at_most(bound: str, gap: float) -> str:
    return f"at most {bound} (gap {percent(gap)})" if math.isfinite(gap) else "no bound yet"


def _tenant_table(answer: FleetShares) -> RenderableType:
    return table_of(
        answer.shares,
        ("'tenant", lambda one: one.name),
        ("parts", lambda one: digits(one.weight)),
        ("requests/s", lambda one: digits(one.rate, 4)),
        ("alone", lambda one: digits(one.alone, 4)),
        ("of alone", lambda one: percent(one.normalised)),
        ("its part", lambda one: digits(one.part, 4)),
        ("over it", lambda one: _times(one.over_part)),
        ("value", lambda one: digits(one.value, 4)),
        ("replicas", lambda one: "none" if one.plan is None else str(len(one.plan.replicas))),
    )


def _gpu_table(answer: FleetShares) -> Table:
    types = list(dict.fromkeys(row.gpu for s in answer.shares if s.plan is not None for row in s.plan.prices))
    used = ((share.name, used_counts(share.plan)) for share in answer.shares)
    return table("'tenant", *types, rows=((name, *(str(of[gpu]) for gpu in types)) for name, of in used))


def envies(found: SharedFleet) -> list[list[float]]:
    """Return the envy [tenant][other]: the rate with the other's GPUs per part, divided by the tenant's own rate.

    Values above 1 are envy.
    """
    shares = found.answers[0].shares

    def over(a: float, b: float) -> float:
        return a / b if b > 0.0 else math.inf if a > 0.0 else 1.0

    return [
        [over(cell.rate / shares[j].weight, shares[i].rate / shares[i].weight) for j, cell in enumerate(row)]
        for i, row in enumerate(found.envy or ())
    ]


def holds(found: SharedFleet) -> list[str]:
    """Return which fairness properties the first answer has, with counter-examples for those it lacks."""
    answer = found.answers[0]
    worse = [
        f"no: {s.name} serves {digits(s.rate, 4)}, its own part of the fleet would serve {digits(s.part, 4)}"
        for s in answer.shares
        if s.over_part < 1.0 - EPSILON
    ]
    lines = worse or ["yes: no tenant is worse off than on its own part of the fleet"]
    return [*lines, _equality(answer), *(() if found.envy is None else _envy_lines(found))]


def _equality(answer: FleetShares) -> str:
    levels = {share.name: share.normalised / share.weight for share in answer.shares}
    most, least = max(levels, key=levels.__getitem__), min(levels, key=levels.__getitem__)
    if levels[most] - levels[least] <= EPSILON * levels[most]:
        return "yes: every tenant has the same share of its rate alone, per part"
    # As many decimals as it takes to show that they differ.
    shown = [(f"{levels[most]:.{n}%}", f"{levels[least]:.{n}%}") for n in range(1, _MOST_DECIMALS + 1)]
    high, low = next((pair for pair in shown if pair[0] != pair[1]), shown[-1])
    return f"no: {most} has {high} of its rate alone per part, {least} {low}"


def _envy_lines(found: SharedFleet) -> Iterator[str]:
    assert found.envy is not None, "it was searched"
    shares, envy, is_free, is_proven = found.answers[0].shares, envies(found), True, True
    for i, j in permutations(range(len(shares)), 2):
        if envy[i][j] > 1.0 + EPSILON:
            is_free = False
            times = f"{envy[i][j]:.2f} times its rate" if math.isfinite(envy[i][j]) else "more than nothing"
            yield f"no: {shares[i].name} would serve {times} with as many GPUs as {shares[j].name}, per part"
        ceiling = found.envy[i][j].bound / shares[j].weight
        is_proven = is_proven and ceiling <= shares[i].rate / shares[i].weight * (1.0 + EPSILON)
    if is_free:
        yield "yes: no tenant envies another" + ("" if is_proven else ", as far as the search shows")


def lost_to_fairness(found: SharedFleet, answer: FleetShares) -> float | None:
    """Return the share of the most efficient rule's value that this rule loses, or None if that was not searched."""
    best = next((one.value for one in found.answers if one.rule is TenantRule.EFFICIENCY), None)
    return None if not best else max(0.0, 1.0 - answer.value / best)


def _tenant_rule_table(found: SharedFleet) -> RenderableType:
    return table_of(
        found.answers,
        ("'rule", lambda one: one.rule.value),
        ("value", lambda one: digits(one.value, 4)),
        ("lost", lambda one: "" if (lost := lost_to_fairness(found, one)) is None else percent(lost)),
        ("gap", lambda one: percent(one.gap) if math.isfinite(one.gap) else "-"),
        ("least of alone", lambda one: f"{one.level:.1%}"),
        ("least over its part", lambda one: _times(min(share.over_part for share in one.shares)).plain),
    )


def tenants_document(found: SharedFleet) -> dict[str, Any]:
    """Return everything as plain data, except the plans themselves, which ``--out`` saves."""
    document = {
        "cluster": found.tenancy.cluster.name,
        "gpus": gpu_counts(found.tenancy.cluster),
        "rules": [_tenant_rule(found, answer) for answer in found.answers],
        **({} if found.envy is None else {"envy": found.envy}),
        "holds": holds(found),
    }
    return {name: json_value(value) for name, value in document.items()}


def _tenant_rule(found: SharedFleet, answer: FleetShares) -> dict[str, Any]:
    names = ("name", "weight", "worth", "rate", "placed", "alone", "alone_bound", "part", "part_bound", "normalised")
    return {
        **fields_of(answer, "rule", "status", "value", "bound", "gap", "level", "level_bound", "level_gap"),
        "lost_to_fairness": lost_to_fairness(found, answer),
        "solve_s": answer.solve_s,
        "tenants": [
            {
                **fields_of(share, *names, "value"),
                "gpus": used_counts(share.plan),
                "replicas": len(share.plan.replicas) if share.plan is not None else 0,
            }
            for share in answer.shares
        ],
        **fields_of(answer, "proof", "level_proof"),
    }
