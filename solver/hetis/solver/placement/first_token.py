"""Time to the first token of replicas whose iterations with a chunk take longer than those without.

All round trips of a prompt carry a chunk, so a limit on TTFT is one on ``RTc = max(M t / n_it, sum_s chunk_s)``
(`docs/cost-model.md`, "Latency"). The first term is a cap on t. The second would couple the stages, so the family
enforces it by a rule for each stage.
"""

from __future__ import annotations

from hetis.solver import cost
from hetis.solver.placement.tables import CostTables
from hetis.solver.placement.template import Template, chunk_stage_seconds, stage_seconds, times_of
from hetis.solver.plan import Role


def ttft_s(costs: CostTables, template: Template) -> float:
    """Return p95 TTFT in seconds, without the landing of a prefill replica's KV."""
    mix, m = costs.mixes[template.mix], costs.problem.family.in_flight[template.in_flight_index]
    if mix.role is Role.DECODE:
        return 0.0
    trip_s = m * template.interval_s / mix.iterations
    if mix.role is Role.UNIFIED:  # all round trips of a prefill replica carry a chunk
        trip_s = max(trip_s, sum(times_of(template, chunk_stage_seconds(costs, template))))
    return cost.ttft_round_trips(costs.moments, costs.problem.assumptions, mix, m) * trip_s


def least_ttft_limit_s(costs: CostTables, template: Template) -> float:
    """Return the least TTFT limit under which the family has this replica, without landing; 0 for decode replicas."""
    mix, m = costs.mixes[template.mix], costs.problem.family.in_flight[template.in_flight_index]
    trip_s = m * template.interval_s / mix.iterations
    if mix.role is Role.UNIFIED:
        chunks_s = times_of(template, chunk_stage_seconds(costs, template))
        if m == 1:
            uneven = max(
                mix.iterations * chunk_s / u
                for chunk_s, u in zip(chunks_s, times_of(template, stage_seconds(costs, template)), strict=True)
            )
            trip_s *= cost.UNEVENNESS_STEP ** cost.unevenness_level(uneven)
        else:
            busiest_s = max(s / stage.copies for stage, s in zip(template.stages, chunks_s, strict=True))
            trip_s = max(trip_s, cost.most_copies(m, template.num_copies) * busiest_s)
    return cost.ttft_round_trips(costs.moments, costs.problem.assumptions, mix, m) * trip_s
