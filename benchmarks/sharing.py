"""One fleet, several models: what every rule yields, what fairness costs, and whether its promise holds at real rates.

    python -m benchmarks.sharing [--quick] [--json]

Rows named after a rule of `hetis-plan share` are placements by the joint master problem. ``value`` is the sum of the
tenants' rates, each over the rate that it reaches alone. ``lost`` is the relative loss of value against the most
efficient placement. ``least`` is the least of these rates per part, with its own gap. ``over_part`` is the least rate
over the rate on the tenant's own part of every GPU class. ``envy`` is the largest factor on a tenant's rate with as
many GPUs as another tenant has, per part. ``promise`` states what the rule promises and whether it held, or gives the
counter-example.

Rows of *oef* are OEF's shares from one speed-up per GPU type (`share --oef`), rounded down to whole GPUs, on which
every tenant is then placed separately: what is fair and best on paper at the rates that replicas really reach.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import EXAMPLES
from benchmarks.measuring.rows import Row
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.sharing import load_tenancy
from hetis.planner.use_cases.sources import named
from hetis.solver.budget import Budget
from hetis.solver.engine_rules import EngineRules
from hetis.solver.placement.families import DEFAULT_ENGINE
from hetis.solver.placement.fleet import IntArray, class_of_slots
from hetis.solver.placement.replicas.tables import FloatArray
from hetis.solver.tenants.fleet_search import FleetSearch
from hetis.solver.tenants.oef import OefOutcome, OefRule, oef_outcomes
from hetis.solver.tenants.tenancy import FleetShares, Tenancy, TenantRule

GAP = 0.01
EPSILON = 1e-6
# Efficiency comes last, because it may reuse the solutions of all other rules.
RULES = (TenantRule.MAX_MIN, TenantRule.EQUAL_THROUGHPUT, TenantRule.SHARING_INCENTIVE, TenantRule.EFFICIENCY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The rates of every tenant: normalised, relative to those of its part, and real ones with the others' GPUs.

    ``normalised`` [tenants] is the rate over the one reached alone, ``over_part`` [tenants] the rate over the one on
    the tenant's own part, and ``envy`` [tenants, tenants] the rate with as many GPUs as the other, per part, over its
    own.
    """

    normalised: FloatArray
    over_part: FloatArray
    envy: FloatArray


def main() -> None:
    """Print all rows."""
    arguments = rows.parser("benchmarks.sharing", __doc__).parse_args()
    rows.exit_if_crashed(rows.show(all_rows(quick=arguments.quick, only=arguments.only), arguments, name="sharing"))


def all_rows(*, quick: bool, only: str = "") -> Iterator[Row]:
    """Yield a row per rule, then OEF's shares."""
    name, tenancy = _case(quick=quick)
    if only not in name:
        return
    search = FleetSearch(tenancy, gap_target=GAP, budget=Budget(clock=time.monotonic))
    answers = {rule: search.share(rule) for rule in RULES}
    best = answers[TenantRule.EFFICIENCY].value
    for rule, answer in answers.items():
        yield _rule_row(f"{name}: {rule}", search, answer, best)
    for found in oef_outcomes(search):
        yield _oef_row(f"{name}: {found.rule}", search, found, best)


def _case(*, quick: bool) -> tuple[str, Tenancy]:
    """Return the three models of the example on 160 GPUs, or two of them on 10."""
    tenants, fleet = str(EXAMPLES / "three-models.yaml"), "h100-l4" if quick else "fleet-160"
    settings = PlacementSettings(engine=named(EngineRules(name=""), DEFAULT_ENGINE))
    tenancy = load_tenancy(tenants, cluster=str(EXAMPLES / f"{fleet}.yaml"), settings=settings).tenancy
    if not quick:
        return "160 GPUs, 3 models", tenancy
    return "10 GPUs, 2 models", Tenancy(tenants=tuple(t for t in tenancy.tenants if t.name != "docs"))


def _rule_row(name: str, search: FleetSearch, answer: FleetShares, best: float) -> Row:
    started_s = time.perf_counter()
    table = _rates_with_others(search, answer)
    envy_s = time.perf_counter() - started_s
    rates = np.array([share.rate / share.weight for share in answer.shares])
    weights = np.array([share.weight for share in answer.shares])
    with_others = table / weights
    outcome = Outcome(
        normalised=np.array([share.normalised for share in answer.shares]),
        over_part=np.array([share.over_part for share in answer.shares]),
        envy=_over(with_others, rates[:, None]),
    )
    names = [share.name for share in answer.shares]
    return {
        "name": name,
        "status": answer.status.value,
        "value": answer.value,
        "gap": answer.gap,
        "lost": max(0.0, 1.0 - answer.value / best),
        "least": answer.level,
        "least_gap": answer.level_gap if answer.level_bound is not None else None,
        "over_part": float(outcome.over_part.min()),
        "envy": _worst_envy(outcome.envy),
        "rates": ", ".join(f"{share.name} {share.rate:.4g}" for share in answer.shares),
        "gpus": "; ".join(f"{s.name} {_gpus(s.plan.prices if s.plan is not None else ())}" for s in answer.shares),
        "promise": _promise(answer.rule, outcome, names),
        "envy_seconds": envy_s,
    }


def _gpus(prices: Sequence[object]) -> str:
    used: dict[str, int] = {}
    for row in prices:
        used[row.gpu] = used.get(row.gpu, 0) + row.used  # type: ignore[attr-defined]
    return " + ".join(f"{count} {gpu}" for gpu, count in used.items() if count) or "none"


def _promise(rule: TenantRule, outcome: Outcome, names: Sequence[str]) -> str:
    """Return whether the rule's promise holds at real rates, and what else fails."""
    found = []
    if rule is TenantRule.EQUAL_THROUGHPUT:
        found.append("equal: held" if np.ptp(outcome.normalised) <= EPSILON else "equal: broken")
    if rule is TenantRule.SHARING_INCENTIVE:
        found.append("no worse than own part: held" if _no_worse(outcome) else "no worse than own part: broken")
    elif not _no_worse(outcome):
        worst = int(np.argmin(outcome.over_part))
        found.append(f"not promised: {names[worst]} has {outcome.over_part[worst]:.2f} of its part's rate")
    if _worst_envy(outcome.envy) > 1.0 + EPSILON:
        found.append(f"not promised: {_who_envies(outcome.envy, names)}")
    return "; ".join(found) or "nothing is broken"


def _no_worse(outcome: Outcome) -> bool:
    return bool(outcome.over_part.min() >= 1.0 - EPSILON)


def _who_envies(envy: FloatArray, names: Sequence[str]) -> str:
    others = envy - np.diag(np.diag(envy))
    i, j = divmod(int(np.argmax(others)), len(names))
    times = f"{others[i, j]:.2f} times its rate" if math.isfinite(others[i, j]) else "more than nothing"
    return f"{names[i]} would have {times} with the GPUs of {names[j]}"


def _worst_envy(envy: FloatArray) -> float:
    return float((envy - np.diag(np.diag(envy))).max(initial=0.0))


def _rates_with_others(search: FleetSearch, answer: FleetShares) -> FloatArray:
    """Return each tenant's rate on as many GPUs of every class as each other one has, [tenants, tenants]."""
    costs, rates = search.replicas[0].costs, np.diag([share.placed for share in answer.shares])
    class_of = class_of_slots(costs.classes)
    classes = {d.name: class_of[d.group.name, d.gpu] for d in costs.problem.cluster.devices()}
    for j, share in enumerate(answer.shares):
        used = Counter(classes[name] for name in share.plan.devices()) if share.plan is not None else Counter[int]()
        rows = zip(costs.resources.rows, search.limits, strict=True)
        limits = np.array([min(limit, used[g]) for (g, _), limit in rows], dtype=np.int64)
        for i, one in enumerate(search.replicas):
            rates[i, j] = rates[i, j] if i == j else search.reach(one, limits, "").rate
    return rates


def _over(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return a / b, which is infinite if only b is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0.0, a / b, 0.0)


# --- OEF's shares on the same fleet


def _oef_row(name: str, search: FleetSearch, found: OefOutcome, best: float) -> Row:
    """Return the row of OEF's shares in whole GPUs, at the rates that are really reached there."""
    weights = np.array([tenant.weight for tenant in search.tenants])
    names = [tenant.name for tenant in search.tenants]
    with_others = np.array([[search.reach(one, limits, "").rate for limits in found.limits] for one in search.replicas])
    envy = _over(with_others / weights, (found.rates / weights)[:, None])
    outcome = Outcome(normalised=found.normalised, over_part=found.over_part, envy=envy)
    broken = []
    if found.rule is OefRule.NON_COOPERATIVE:
        per_part = outcome.normalised / weights
        broken.append(f"equal: broken, {per_part.min():.1%} to {per_part.max():.1%} of the rate alone")
    else:
        envied = _worst_envy(outcome.envy) > 1.0 + EPSILON
        broken.append(f"no envy: broken, {_who_envies(outcome.envy, names)}" if envied else "no envy: held")
    if not _no_worse(outcome):
        worst = int(np.argmin(outcome.over_part))
        broken.append(f"{names[worst]} has {outcome.over_part[worst]:.2f} of its part's rate")
    return {
        "name": name,
        "status": "feasible",
        "value": found.value,
        "gap": None,
        "lost": max(0.0, 1.0 - found.value / best),
        "least": found.level,
        "least_gap": None,
        "over_part": float(outcome.over_part.min()),
        "envy": _worst_envy(outcome.envy),
        "rates": ", ".join(f"{n} {rate:.4g}" for n, rate in zip(names, found.rates, strict=True)),
        "gpus": "; ".join(f"{n} {_whole(found, gpus)}" for n, gpus in zip(names, found.gpus, strict=True)),
        "promise": "; ".join(broken),
        "envy_seconds": None,
    }


def _whole(found: OefOutcome, gpus: IntArray) -> str:
    named = zip(gpus.tolist(), found.classes, strict=True)
    return " + ".join(f"{count} {name}" for count, name in named if count) or "none"


if __name__ == "__main__":
    main()
