"""A shared fleet as tables and as a document: rates and GPUs by tenant, properties, and the cost of fairness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.dispatch import plain_table
from hetis.planner.report.figures import digits, percent
from hetis.planner.report.plan import section
from hetis.planner.use_cases.share import SharedFleet
from hetis.solver.tenants.problem import FleetShares, PriceProof, TenantRule, TenantShare

EPSILON = 1e-6
MAX_ENVY = 8  # tenants whose envy is shown as a matrix; -o json has all

_RULES = {
    TenantRule.EFFICIENCY: "the most total value, whoever has it",
    TenantRule.EQUAL_THROUGHPUT: "the same share of its rate alone for everybody, per part",
    TenantRule.MAX_MIN: "the least share of its rate alone as high as can be, then value",
    TenantRule.SHARING_INCENTIVE: "nobody below its own part of the fleet, then value",
}


def render_tenants(found: SharedFleet) -> RenderableType:
    """Return the table view, at most 80 columns wide if names and GPU types allow it."""
    return Group(*_sections(found))


def _sections(found: SharedFleet) -> Iterator[RenderableType]:
    answer = found.answers[0]
    yield Text.assemble(("rule    ", "bold"), f"{answer.rule}: {_RULES[answer.rule]}")
    yield Text.assemble(
        ("value   ", "bold"), f"{digits(answer.value, 4)}, {_at_most(digits(answer.bound, 4), answer.gap)}"
    )
    if answer.level_bound is not None:
        level = (
            f"{answer.level:.1%} of its rate alone per part, {_at_most(f'{answer.level_bound:.1%}', answer.level_gap)}"
        )
        yield Text.assemble(("least   ", "bold"), level)
    yield Text()
    yield _share_table(answer)
    yield section("GPUs", _gpu_table(answer))
    yield section("what holds", Group(*(Text(f" {line}") for line in holds(found))))
    if found.envy is not None and 1 < len(answer.shares) <= MAX_ENVY:
        yield section("envy: own rate with as many GPUs as the other, per part, over one's own", _envy_table(found))
    if len(found.answers) > 1:
        yield section("rules compared", _rule_table(found))


def _at_most(bound: str, gap: float) -> str:
    return f"at most {bound} (gap {percent(gap)})" if math.isfinite(gap) else "no bound yet"


def _share_table(answer: FleetShares) -> Table:
    table = plain_table(
        ("tenant", "left"), ("parts", "right"), ("requests/s", "right"), ("alone", "right"), ("of alone", "right"),
        ("its part", "right"), ("over it", "right"), ("value", "right"), ("replicas", "right"),
    )  # fmt: skip
    for share in answer.shares:
        over = share.over_part
        table.add_row(
            share.name, digits(share.weight), digits(share.rate, 4), digits(share.alone, 4), percent(share.normalised),
            digits(share.part, 4),
            Text(f"{over:.2f}x" if math.isfinite(over) else "-", style="red" if over < 1.0 - EPSILON else ""),
            digits(share.value, 4), str(len(share.plan.replicas)) if share.plan is not None else "none",
        )  # fmt: skip
    return table


def _used(share: TenantShare) -> dict[str, int]:
    """Return the number of GPUs in use by type."""
    used: dict[str, int] = {}
    for row in share.plan.prices if share.plan is not None else ():
        used[row.gpu] = used.get(row.gpu, 0) + row.used
    return used


def _there(found: SharedFleet) -> dict[str, int]:
    there: dict[str, int] = {}
    for group in found.tenancy.cluster.node_groups:
        for slots in group.gpus:
            there[slots.gpu] = there.get(slots.gpu, 0) + group.count * slots.count
    return there


def _gpu_table(answer: FleetShares) -> Table:
    types = list(dict.fromkeys(row.gpu for s in answer.shares if s.plan is not None for row in s.plan.prices))
    table = plain_table(("tenant", "left"), *((gpu, "right") for gpu in types))
    for share in answer.shares:
        used = _used(share)
        table.add_row(share.name, *(str(used.get(gpu, 0)) for gpu in types))
    return table


def envies(found: SharedFleet) -> list[list[float]]:
    """Return the envy [tenant][other]: the rate with the other's GPUs per part, over the own rate; above 1 is envy."""
    shares = found.answers[0].shares
    return [
        [_over(cell.rate / shares[j].weight, shares[i].rate / shares[i].weight) for j, cell in enumerate(row)]
        for i, row in enumerate(found.envy or ())
    ]


def _over(a: float, b: float) -> float:
    if b > 0.0:
        return a / b
    return math.inf if a > 0.0 else 1.0


def holds(found: SharedFleet) -> list[str]:
    """Return which properties the first answer has, with counter-examples for those it lacks."""
    answer = found.answers[0]
    lines = []
    worse = [share for share in answer.shares if share.over_part < 1.0 - EPSILON]
    if worse:
        lines += [
            f"no: {s.name} serves {digits(s.rate, 4)}, its own part of the fleet would serve {digits(s.part, 4)}"
            for s in worse
        ]
    else:
        lines.append("yes: nobody is worse off than on its own part of the fleet")
    lines.append(_equality(answer))
    if found.envy is not None:
        lines += _envy_lines(found)
    return lines


def _equality(answer: FleetShares) -> str:
    levels = [share.normalised / share.weight for share in answer.shares]
    if max(levels) - min(levels) <= EPSILON * max(levels):
        return "yes: everybody has the same share of its rate alone, per part"
    most = answer.shares[levels.index(max(levels))].name
    least = answer.shares[levels.index(min(levels))].name
    return f"no: {most} has {max(levels):.1%} of its rate alone per part, {least} {min(levels):.1%}"


def _envy_lines(found: SharedFleet) -> Iterator[str]:
    shares, table, proven = found.answers[0].shares, envies(found), True
    nobody = True
    for i, row in enumerate(table):
        for j, envy in enumerate(row):
            if i == j:
                continue
            if envy > 1.0 + EPSILON:
                nobody = False
                times = f"{envy:.2f} times its rate" if math.isfinite(envy) else "more than nothing"
                yield f"no: {shares[i].name} would serve {times} with as many GPUs as {shares[j].name}, per part"
            assert found.envy is not None
            ceiling = found.envy[i][j].bound / shares[j].weight
            proven = proven and ceiling <= shares[i].rate / shares[i].weight * (1.0 + EPSILON)
    if nobody:
        yield "yes: nobody envies anybody" + ("" if proven else ", as far as was searched")


def _envy_table(found: SharedFleet) -> Table:
    names = [share.name for share in found.answers[0].shares]
    table = plain_table(("", "left"), *((name, "right") for name in names))
    for i, (name, row) in enumerate(zip(names, envies(found), strict=True)):
        table.add_row(
            name,
            *(
                Text("·" if i == j else f"{envy:.2f}", style="red" if i != j and envy > 1.0 + EPSILON else "")
                for j, envy in enumerate(row)
            ),
        )
    return table


def lost_to_fairness(found: SharedFleet, answer: FleetShares) -> float | None:
    """Return the share of the most efficient rule's value that this rule loses, or None if that was not searched."""
    best = next((one.value for one in found.answers if one.rule is TenantRule.EFFICIENCY), None)
    return None if not best else max(0.0, 1.0 - answer.value / best)


def _rule_table(found: SharedFleet) -> Table:
    table = plain_table(
        ("rule", "left"), ("value", "right"), ("lost", "right"), ("gap", "right"), ("least of alone", "right"),
        ("least over its part", "right"),
    )  # fmt: skip
    for answer in found.answers:
        lost = lost_to_fairness(found, answer)
        over = min(share.over_part for share in answer.shares)
        table.add_row(
            answer.rule.value, digits(answer.value, 4), "" if lost is None else percent(lost), _gap(answer.gap),
            f"{answer.level:.1%}", f"{over:.2f}x" if math.isfinite(over) else "-",
        )  # fmt: skip
    return table


def _gap(gap: float) -> str:
    return percent(gap) if math.isfinite(gap) else "-"


def tenants_document(found: SharedFleet) -> dict[str, Any]:
    """Return everything as plain data except the plans themselves, which ``--out`` saves."""
    document: dict[str, Any] = {
        "cluster": found.tenancy.cluster.name,
        "gpus": _there(found),
        "rules": [_rule_document(found, answer) for answer in found.answers],
    }
    if found.envy is not None:
        document["envy"] = [[{"rate": c.rate, "bound": _finite(c.bound)} for c in row] for row in found.envy]
    document["holds"] = holds(found)
    return document


def _rule_document(found: SharedFleet, answer: FleetShares) -> dict[str, Any]:
    return {
        "rule": answer.rule.value,
        "status": answer.status.value,
        "value": answer.value,
        "bound": _finite(answer.bound),
        "gap": _finite(answer.gap),
        "level": answer.level,
        "level_bound": _finite(answer.level_bound),
        "level_gap": _finite(answer.level_gap),
        "lost_to_fairness": lost_to_fairness(found, answer),
        "solve_s": answer.solve_s,
        "tenants": [
            {
                "name": share.name,
                "weight": share.weight,
                "worth": share.worth,
                "rate": share.rate,
                "placed": share.placed,
                "alone": share.alone,
                "alone_bound": share.alone_bound,
                "part": share.part,
                "part_bound": share.part_bound,
                "normalised": share.normalised,
                "value": share.value,
                "gpus": _used(share),
                "replicas": len(share.plan.replicas) if share.plan is not None else 0,
            }
            for share in answer.shares
        ],
        "proof": _proof_document(answer.proof),
        "level_proof": _proof_document(answer.level_proof),
    }


def _proof_document(proof: PriceProof | None) -> dict[str, Any] | None:
    if proof is None:
        return None
    return {
        "rows": [
            {
                "gpu": row.gpu,
                "gpus_per_node": row.gpus_per_node,
                "tp_at_least": row.tp_at_least,
                "limit": row.limit,
                "price": row.price,
            }
            for row in proof.rows
        ],
        "multipliers": list(proof.multipliers),
        "floors": list(proof.floors),
        "bound": proof.bound,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
