"""Replicas that were found, with other iterations: where requests wait, fewer at once or other chunks may keep more.

A search that counts saturated rates fills the limits on latency with large batches and chunks, whose iterations are
long. Replicas of the same stages with less in each iteration serve less when saturated, but prompts wait less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hetis.solver import mixes
from hetis.solver.placement.outcome import Outcome
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.template import Template, interval_of, room_layers
from hetis.solver.plan import Role

SHARES = (1.0, 0.75, 0.6, 0.45, 0.3)  # of a micro-batch, at most
EXACT = 1e-9


def retuned(costs: CostTables, outcome: Outcome) -> Iterator[Outcome]:
    """Yield the outcome with every chunk of the family and smaller micro-batches in all of its unified replicas."""
    unified = [t for t, _ in outcome.chosen if costs.mixes[t.mix].role is Role.UNIFIED]
    if not unified:
        return
    for chunk in costs.problem.family.chunk_tokens:
        tried = {tuple(unified)}
        for share in SHARES:
            others = {template: _with(costs, template, chunk, share) for template in unified}
            changed = {template: other for template, other in others.items() if other is not None}
            if len(changed) < len(others) or (key := tuple(changed.values())) in tried:
                continue
            tried.add(key)
            yield replace(outcome, chosen=tuple((changed.get(t, t), n) for t, n in outcome.chosen))


def _with(costs: CostTables, template: Template, chunk_tokens: int, share: float) -> Template | None:
    """Return a replica of the same stages with this chunk and at most a share of its micro-batch, if it may run so."""
    mix, m = costs.mixes[template.mix], costs.problem.family.in_flight[template.in_flight_index]
    kind = mix.sends_afar, mix.attention_dp
    alike = [
        (other.micro_batch, x)
        for x, other in enumerate(costs.mixes)
        if other.role is Role.UNIFIED
        and other.chunk_tokens == chunk_tokens
        and (other.sends_afar, other.attention_dp) == kind
        and other.micro_batch <= max(1.0, share * mix.micro_batch)
    ]
    if not alike:
        return None
    _, x = max(alike)
    other = replace(template, mix=x)
    other = replace(other, interval_s=interval_of(costs, other))
    tpot_s = mixes.tpot_per_interval(costs.problem.model, costs.mixes[x], m) * other.interval_s
    limit_s = costs.of_scope(template.scope).problem.objective.tpot_limit_s
    is_in_time = limit_s is None or tpot_s <= limit_s * (1.0 + EXACT)
    fits = all(room_layers(costs, other, i) >= stage.layers for i, stage in enumerate(other.stages))
    return other if is_in_time and fits else None
