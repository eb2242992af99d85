"""One fleet, several models: what every rule yields, what fairness costs, and whether its promise holds at real rates.

    python -m benchmarks.sharing [--quick] [--json]

Rows named after a rule of `hetis-plan share` are placements by the joint master problem. ``value`` is the sum of the
tenants' rates, each over the rate that it reaches alone. ``lost`` is the relative loss of value against the most
efficient placement. ``least`` is the least of these rates per part, with its own gap. ``over_part`` is the least rate
over the rate on the tenant's own part of every GPU class. ``envy`` is the largest factor on a tenant's rate with as
many GPUs as another tenant has, per part. ``promise`` states what the rule promises and whether it held, or gives the
counter-example.

Rows called *linear* are the shares of `hetis-plan fair` from one speed-up per GPU type, rounded down to whole GPUs, on
which every tenant is then placed separately. They show what is fair and best on paper at the rates that replicas really
reach.
"""

from __future__ import annotations

import math
import time
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
from hetis.solver.placement.families import DEFAULT_ENGINE
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.tables import FloatArray
from hetis.solver.problem import EngineRules
from hetis.solver.shares.fair_shares import solve_shares
from hetis.solver.shares.share_problem import FairnessRule, GpuShare, ShareJob, ShareProblem, ShareTenant
from hetis.solver.tenants.fleet_search import PART_SECONDS, FleetSearch
from hetis.solver.tenants.tenancy import FleetShares, Tenancy, Tenant, TenantRule

GAP = 0.01
EPSILON = 1e-6
LINEAR = (FairnessRule.COOPERATIVE, FairnessRule.NON_COOPERATIVE, FairnessRule.EQUAL)
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
    """Yield a row per rule, then the shares from one speed-up per GPU type."""
    name, tenancy = _case(quick=quick)
    if only not in name:
        return
    search = FleetSearch(tenancy, gap_target=GAP, budget=Budget(clock=time.monotonic))
    answers = {rule: search.share(rule) for rule in RULES}
    best = answers[TenantRule.EFFICIENCY].value
    for rule, answer in answers.items():
        yield _rule_row(f"{name}: {rule}", search, answer, best)
    problem = linear_problem(search)
    for linear in LINEAR:
        yield _linear_row(f"{name}: linear {linear}", search, problem, linear, best)


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
    table = search.envy(answer)
    envy_s = time.perf_counter() - started_s
    rates = np.array([share.rate / share.weight for share in answer.shares])
    weights = np.array([share.weight for share in answer.shares])
    with_others = np.array([[cell.rate for cell in row] for row in table]) / weights
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


def _over(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return a / b, which is infinite if only b is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0.0, a / b, 0.0)


# --- shares from one speed-up per GPU type on the same fleet


def linear_problem(search: FleetSearch) -> ShareProblem:
    """Return the sharing problem whose speed-ups are the rates per GPU on each class of GPUs alone."""
    costs = search.replicas[0].costs
    tenants = []
    for solver in search.replicas:
        speedups = []
        for g, c in enumerate(costs.classes):
            here = np.array([row[0] == g for row in costs.resources.rows])
            only = np.where(here, search.limits, 0)
            speedups.append(_alone(search, solver.tenant, only) / c.available)
        job = ShareJob(name="serve", speedups=tuple(speedups))
        tenants.append(ShareTenant(name=solver.tenant.name, weight=solver.tenant.weight, jobs=(job,)))
    gpus = tuple(GpuShare(gpu=f"{g} {c.gpu}", count=c.available) for g, c in enumerate(costs.classes))
    return ShareProblem(gpus=gpus, tenants=tuple(tenants))


def _alone(search: FleetSearch, tenant: Tenant, limits: IntArray) -> float:
    one = next(c for c in search.replicas if c.tenant is tenant)
    return one.reach(limits, Budget(time_limit_s=PART_SECONDS, clock=time.process_time)).rate


def _linear_row(name: str, search: FleetSearch, problem: ShareProblem, rule: FairnessRule, best: float) -> Row:
    """Return the row of the linear shares in whole GPUs, at the rates that are really reached there."""
    shares = solve_shares(problem, rule)
    whole = np.floor(shares.amounts + EPSILON).astype(np.int64)
    rows_of = [g for g, _ in search.replicas[0].costs.resources.rows]
    limits = [np.minimum(search.limits, amounts[rows_of]) for amounts in whole]
    tenants = [solver.tenant for solver in search.replicas]
    weights = np.array([tenant.weight for tenant in tenants])
    with_others = np.array([[_alone(search, tenant, limit) for limit in limits] for tenant in tenants])
    rates = np.diag(with_others)
    outcome = Outcome(
        normalised=rates / np.array([reach.rate for reach in search.alone]),
        over_part=_over(rates, np.array([reach.rate for reach in search.parts])),
        envy=_over(with_others / weights, (rates / weights)[:, None]),
    )
    names = [tenant.name for tenant in tenants]
    broken = []
    if rule is FairnessRule.NON_COOPERATIVE:
        per_part = outcome.normalised / weights
        broken.append(f"equal: broken, {per_part.min():.1%} to {per_part.max():.1%} of the rate alone")
    if rule is FairnessRule.COOPERATIVE:
        envied = _worst_envy(outcome.envy) > 1.0 + EPSILON
        broken.append(f"no envy: broken, {_who_envies(outcome.envy, names)}" if envied else "no envy: held")
    if not _no_worse(outcome):
        worst = int(np.argmin(outcome.over_part))
        broken.append(f"{names[worst]} has {outcome.over_part[worst]:.2f} of its part's rate")
    value = float(outcome.normalised.sum())
    return {
        "name": name,
        "status": "feasible",
        "value": value,
        "gap": None,
        "lost": max(0.0, 1.0 - value / best),
        "least": float((outcome.normalised / weights).min()),
        "least_gap": None,
        "over_part": float(outcome.over_part.min()),
        "envy": _worst_envy(outcome.envy),
        "rates": ", ".join(f"{n} {rate:.4g}" for n, rate in zip(names, rates, strict=True)),
        "gpus": "; ".join(f"{n} {_whole(problem, amounts)}" for n, amounts in zip(names, whole, strict=True)),
        "promise": "; ".join(broken) or "nothing is broken",
        "envy_seconds": None,
    }


def _whole(problem: ShareProblem, amounts: IntArray) -> str:
    named = zip(amounts.tolist(), problem.gpus, strict=True)
    return " + ".join(f"{count} {gpu.gpu.partition(' ')[2]}" for count, gpu in named if count) or "none"


if __name__ == "__main__":
    main()
