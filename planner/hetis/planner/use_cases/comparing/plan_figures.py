"""The figures of a plan by which it is compared with others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hetis.planner.use_cases.prices import price_of_plan
from hetis.planner.use_cases.record.parts import Requested, Verified
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.plan import ObjectiveKind, Plan, Role
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of a plan by which strategies are compared."""

    rate_rps: float  # goodput, or throughput if that is the objective
    prompt_tokens_per_s: float  # at ``rate_rps``
    output_tokens_per_s: float  # at ``rate_rps``
    usd_per_hour: float | None  # price of the used GPUs; None: at least one has no price
    usd_per_million_output_tokens: float | None  # at `cost_rate`, or at ``rate_rps`` if that is None
    ttft_s: float  # TTFT of the slowest replica; 0 if there is none
    tpot_s: float  # TPOT of the slowest replica; 0 if there is none
    kv_tokens: int  # KV capacity of the replicas that decode
    gpus_used: int
    gpus_idle: int


def figures_of(plan: Plan, inputs: Inputs | PlacementProblem) -> Figures:
    """Return the figures of a plan at its planned rate.

    Raises:
        DocumentError: the objective that was requested is not usable.
    """
    rate = plan.planned_rate()
    usd = price_of_plan(plan, inputs.cluster)
    moments = inputs.workload.clipped_to(inputs.model.max_position).moments()
    output_per_s, cost_rps = rate * moments.mean_output, cost_rate(plan)
    paid_per_s = output_per_s if cost_rps is None else cost_rps * moments.mean_output
    used = len(plan.devices())
    return Figures(
        rate_rps=rate,
        prompt_tokens_per_s=rate * moments.mean_prompt,
        output_tokens_per_s=output_per_s,
        usd_per_hour=usd,
        usd_per_million_output_tokens=None if usd is None or not paid_per_s else 1e6 * usd / (3600.0 * paid_per_s),
        ttft_s=max((replica.ttft_s for replica in plan.replicas), default=0.0),
        tpot_s=max((replica.tpot_s for replica in plan.replicas), default=0.0),
        kv_tokens=sum(replica.kv_tokens for replica in plan.replicas if replica.role is not Role.PREFILL),
        gpus_used=used,
        gpus_idle=inputs.cluster.num_gpus() - used - len(plan.held_by_others()),
    )


def cost_rate(plan: Plan) -> float | None:
    """Return the demanded rate, at which a plan that minimises is paid for; None: the plan maximises its rate.

    Such a plan could serve more, but that is not the traffic it is bought for.

    Raises:
        DocumentError: the objective that was requested is not usable.
    """
    return None if plan.objective.maximises else Requested.of(plan).objective(plan.objective).demand_rps


class KeptPromise(NamedTuple):
    """The part of a plan's promise that simulated traffic kept."""

    rate_rps: float  # the highest rate up to the planned one that kept the limits; 0: none of those simulated
    is_all: bool  # whether that is the planned rate


def kept_of(plan: Plan) -> KeptPromise | None:
    """Return what simulated traffic kept of a plan's promise.

    None if the plan was not simulated, or promises throughput.
    """
    found = Verified.of(plan).verification
    if found is None or plan.objective.kind is ObjectiveKind.THROUGHPUT:  # throughput is not the rate that is simulated
        return None
    planned_rps = plan.result.value if plan.objective.maximises else found.rate_rps
    rate_rps = min(found.kept_rps or 0.0, planned_rps)
    return KeptPromise(rate_rps, found.kept or rate_rps >= planned_rps > 0.0)
