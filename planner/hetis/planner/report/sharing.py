"""A fleet shared among tenants, as tables and as a document."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.figures import digits, percent
from hetis.planner.report.tables import as_group, grid, section, table, table_of
from hetis.planner.use_cases.grouping import gpu_counts, used_counts
from hetis.planner.use_cases.json_values import fields_of, json_value
from hetis.planner.use_cases.sharing import SharedFleet
from hetis.solver.tenants.oef import OefOutcome
from hetis.solver.tenants.tenancy import FleetShares, TenantRule

EPSILON = 1e-6
MAX_ROUNDS = 20
_MOST_DECIMALS = 4  # of per cent: as fine as EPSILON


def _headed(*lines: tuple[str, RenderableType]) -> Table:
    """Return lines, each after its heading, with hanging indents."""
    return grid(False, True, rows=((Text(heading, style="bold"), line) for heading, line in lines))


def _times(ratio: float) -> Text:
    """Return how many times as much as without sharing a tenant has, in red if it is less."""
    return Text(f"{ratio:.2f}x" if math.isfinite(ratio) else "-", style="red" if ratio < 1.0 - EPSILON else "")


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
    if len(found.answers) > 1:
        yield section("rules compared", _tenant_rule_table(found))
    if found.oef:
        yield section("OEF: shares by one speed-up per GPU type, in whole GPUs at real rates", _oef_table(found))


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


def holds(found: SharedFleet) -> list[str]:
    """Return which fairness properties the first answer has, with counter-examples for those it lacks."""
    answer = found.answers[0]
    worse = [
        f"no: {s.name} serves {digits(s.rate, 4)}, its own part of the fleet would serve {digits(s.part, 4)}"
        for s in answer.shares
        if s.over_part < 1.0 - EPSILON
    ]
    lines = worse or ["yes: no tenant is worse off than on its own part of the fleet"]
    return [*lines, _equality(answer)]


def _equality(answer: FleetShares) -> str:
    levels = {share.name: share.normalised / share.weight for share in answer.shares}
    most, least = max(levels, key=levels.__getitem__), min(levels, key=levels.__getitem__)
    if levels[most] - levels[least] <= EPSILON * levels[most]:
        return "yes: every tenant has the same share of its rate alone, per part"
    # As many decimals as it takes to show that they differ.
    shown = [(f"{levels[most]:.{n}%}", f"{levels[least]:.{n}%}") for n in range(1, _MOST_DECIMALS + 1)]
    high, low = next((pair for pair in shown if pair[0] != pair[1]), shown[-1])
    return f"no: {most} has {high} of its rate alone per part, {least} {low}"


def lost_to_fairness(found: SharedFleet, answer: FleetShares | OefOutcome) -> float | None:
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


def _oef_table(found: SharedFleet) -> RenderableType:
    return table_of(
        found.oef,
        ("'rule", lambda one: one.rule.value.removeprefix("oef-")),
        ("value", lambda one: digits(one.value, 4)),
        ("lost", lambda one: "" if (lost := lost_to_fairness(found, one)) is None else percent(lost)),
        *((tenant.name, _rate_of(i)) for i, tenant in enumerate(found.tenancy.tenants)),
        ("least of alone", lambda one: f"{one.level:.1%}"),
        ("least over part", lambda one: _times(float(one.over_part.min())).plain),
    )


def _rate_of(tenant: int) -> Callable[[OefOutcome], str]:
    return lambda one: f"{digits(float(one.rates[tenant]), 3)}/s"


def tenants_document(found: SharedFleet) -> dict[str, Any]:
    """Return everything as plain data, except the plans themselves, which ``--out`` saves."""
    document = {
        "cluster": found.tenancy.cluster.name,
        "gpus": gpu_counts(found.tenancy.cluster),
        "rules": [_tenant_rule(found, answer) for answer in found.answers],
        "holds": holds(found),
        **({"oef": [_oef_rule(found, one) for one in found.oef]} if found.oef else {}),
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


def _oef_rule(found: SharedFleet, one: OefOutcome) -> dict[str, Any]:
    tenants = zip(found.tenancy.tenants, one.shares.amounts, one.rates, one.normalised, one.over_part, strict=True)
    return {
        **fields_of(one, "rule", "value", "level"),
        "lost_to_fairness": lost_to_fairness(found, one),
        "tenants": [
            {
                "name": tenant.name,
                "shares": dict(zip(one.classes, amounts.tolist(), strict=True)),
                "rate": float(rate),
                "normalised": float(normalised),
                "over_part": float(over_part),
            }
            for tenant, amounts, rate, normalised, over_part in tenants
        ],
    }
