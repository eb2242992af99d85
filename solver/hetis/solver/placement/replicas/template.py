"""Templates, which are replicas without named GPUs.

All round trips of a prompt carry a chunk, so a limit on TTFT is a limit on ``RTc = max(M t / n_it, sum_s chunk_s)``
(`docs/cost-model.md`, "Latency"). The first term is a cap on t. The second would couple the stages, so the family
enforces it by a rule for each stage of a replica with several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from hetis.solver import mixes
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.stage_cost import (
    fixed_by_role,
    iterations_of,
    kept_bytes,
    layers_on_cards,
    layers_on_rank,
    pool_entry,
    slack,
    stage_roles,
)
from hetis.solver.placement.replicas.tables import BOTH, FIRST, LAST, CostTables, FloatArray
from hetis.solver.plan import Role


@dataclass(frozen=True, slots=True)
class TemplateStage:
    """A TP group of rank type s with l repeated layers, of whose head groups p cards of class q take k."""

    rank: int
    layers: int
    pool_class: int = -1
    pool_cards: int = 0
    pool_groups: int = 0


@dataclass(frozen=True, slots=True)
class Template:
    """One replica of the family: a column of the master. ``rate`` is in requests/s."""

    scope: int
    mix: int
    in_flight_index: int
    stages: tuple[TemplateStage, ...]
    interval_s: float

    @property
    def rate(self) -> float:
        return 1.0 / self.interval_s

    @property
    def ranks(self) -> IntArray:
        """Return the rank type of every stage; [D]."""
        return np.array([stage.rank for stage in self.stages], dtype=np.int64)

    @property
    def shape(self) -> tuple[object, ...]:
        """Return what identifies a template: everything except its interval, which follows from the rest."""
        return self.scope, self.mix, self.in_flight_index, self.stages


def stages_in(
    costs: CostTables, before: CostTables, class_of: Sequence[int], template: Template
) -> tuple[TemplateStage, ...]:
    """Return a replica's stages in terms of another fleet's cost tables; none if that fleet lacks such GPUs.

    ``class_of`` [N] maps the classes of the cost tables ``before`` to classes there; -1: none.
    """
    stages = []
    for stage in template.stages:
        device_class, size = before.ranks[stage.rank]
        rank = costs.rank_of(class_of[device_class], size, before.rank_dp[stage.rank])
        pool_class = class_of[stage.pool_class] if stage.pool_class >= 0 else -1
        if rank is None or pool_class < 0 <= stage.pool_class:
            return ()
        stages.append(replace(stage, rank=rank, pool_class=pool_class))
    return tuple(stages)


def stage_seconds(costs: CostTables, template: Template, *, with_chunk: bool = False) -> tuple[FloatArray, FloatArray]:
    """Return (w, fixed) of the stages: one with l repeated layers takes ``l w + fixed`` seconds per request; [D] each.

    With ``with_chunk``, return those of one iteration with a chunk, in a unified replica, where no KV is on the wire.
    """
    t, x, s = costs.scopes[template.scope].tables, template.mix, template.ranks
    times = t.chunk if with_chunk else t
    attention_s, wire_s = times.own_s[x, s, t.rank_groups[s]], t.wire_s[x, s].copy()
    for i, stage in enumerate(template.stages):
        if stage.pool_class >= 0:
            size = costs.pool_sizes.index(stage.pool_cards)
            attention_s[i] = times.pool_s[x, pool_entry(t, stage.rank, stage.pool_class, stage.pool_groups, size)]
            wire_s[i] = 0.0  # KV is not handed over to replicas with attention workers
    wire_s = 0.0 * wire_s if with_chunk else wire_s
    compute_s = times.layer_s[x, s] + attention_s
    has_pool = np.array([stage.pool_class >= 0 for stage in template.stages])
    by_role = fixed_by_role(t, times, x, s, compute_s, wire_s, has_pool)
    fixed_s = by_role[np.arange(len(s)), stage_roles(len(s))]
    return np.maximum(compute_s, wire_s), fixed_s


def times_of(template: Template, seconds: tuple[FloatArray, FloatArray]) -> FloatArray:
    """Return the seconds of every stage with its layers, given (seconds per layer, fixed); [D]."""
    per_layer_s, fixed_s = seconds
    return np.asarray([stage.layers for stage in template.stages] * per_layer_s + fixed_s)


def slacked_times(costs: CostTables, template: Template) -> FloatArray:
    """Return the seconds per request of every stage, stretched by its slack; [D]."""
    t, m = costs.scopes[template.scope].tables, costs.problem.family.in_flight[template.in_flight_index]
    own = costs.of_scope(template.scope)
    of_role = own.regimes(costs.mixes[template.mix].role)
    regime = mixes.regime_of(of_role, in_flight=m, num_copies=len(template.stages))
    if m == 1:
        regime = own.regime_together(template.mix)
    plain, (chunk_s, _) = stage_seconds(costs, template), stage_seconds(costs, template, with_chunk=True)
    iterations = iterations_of(t, template.mix, template.in_flight_index)
    return np.asarray((1.0 + slack(iterations, plain[0], chunk_s, *regime)) * times_of(template, plain))


def interval_of(costs: CostTables, template: Template) -> float:
    """Return t of `docs/cost-model.md`."""
    times = slacked_times(costs, template)
    m = costs.problem.family.in_flight[template.in_flight_index]
    return float(max(times.max(), times.sum() / m))


def with_fewest_in_flight(costs: CostTables, template: Template) -> Template:
    """Return a prefill replica with no more micro-batches than its rate needs; leave others, and any with a TTFT limit.

    KV in flight occupies room twice, because a prompt's KV has its place on the decode replica from the beginning.
    """
    if costs.mixes[template.mix].role is not Role.PREFILL or costs.of_scope(template.scope).has_ttft_limit:
        return template
    for index, m in sorted(enumerate(costs.problem.family.in_flight), key=lambda pair: pair[1]):
        fewer = replace(template, in_flight_index=index)
        if m >= len(template.stages) and math.isclose(interval_of(costs, fewer), template.interval_s, rel_tol=1e-12):
            return fewer
    return template


def kv_tokens_held(costs: CostTables, template: Template, stage: TemplateStage) -> tuple[int, float]:
    """Return (D, Tkv) of a stage: the micro-batches whose KV one copy holds, and their tokens."""
    t, f = costs.scopes[template.scope].tables, template.in_flight_index
    return int(t.in_flight[f]), float(t.kv_tokens[template.mix, f])


def fixed_bytes(costs: CostTables, template: Template, index: int) -> float:
    """Return the bytes of a rank that do not grow with repeated layers or KV: activations, ends, prefix weights."""
    t = costs.scopes[template.scope].tables
    s, x, role = template.stages[index].rank, template.mix, stage_roles(len(template.stages))[index]
    f = template.in_flight_index
    total = float(t.act_bytes[x, f, s])
    if role in (FIRST, BOTH):
        total += t.first_bytes[s]
    if role in (LAST, BOTH):
        total += t.last_bytes[s] + t.logit_bytes[x, f, s]
    if role == BOTH:
        total -= t.tied_bytes[s]
    return total


def room_layers(costs: CostTables, template: Template, index: int, more_tokens: float = 0.0) -> int:
    """Return the repeated layers that fit on a stage (and its pool), with so many more KV tokens in a copy."""
    t = costs.scopes[template.scope].tables
    stage, role = template.stages[index], stage_roles(len(template.stages))[index]
    held, tokens = kv_tokens_held(costs, template, stage)
    kept = kept_bytes(t, template.mix, template.in_flight_index, stage.rank, stage.pool_groups)
    kept, tokens = kept + t.rank_groups[stage.rank] * more_tokens * t.kv_group_bytes, tokens + more_tokens
    layers = float(layers_on_rank(t, template.mix, template.in_flight_index, stage.rank, kept)[role])
    if stage.pool_class >= 0:
        requests, tp = held * int(t.micro_batch[template.mix]), int(t.rank_tp[stage.rank])
        on_cards = layers_on_cards(t, stage.pool_class, tp, stage.pool_groups, stage.pool_cards, requests, tokens)
        layers = min(layers, float(on_cards) - (t.prefix_layers if index == 0 else 0))
    return max(0, int(layers))


def use_of(costs: CostTables, template: Template) -> IntArray:
    """Return how much a template takes of every master row, shape [rows]."""
    use = np.zeros(len(costs.resources.rows), dtype=np.int64)
    for stage in template.stages:
        use += costs.group_use[stage.rank]
        if stage.pool_class >= 0:
            use += stage.pool_cards * costs.card_use[stage.pool_class]
    return use


def landing_s(costs: CostTables, template: Template) -> float:
    """Return the seconds that landing the KV of a prompt's last chunk adds to TTFT, from the slowest stage."""
    landing = costs.scopes[template.scope].tables.landing_s
    return float(max(landing[template.mix, stage.rank] for stage in template.stages))


def gpus_of(costs: CostTables, template: Template) -> Counter[int]:
    """Return the GPUs of each class that a template takes."""
    count: Counter[int] = Counter()
    for stage in template.stages:
        device_class, tp = costs.ranks[stage.rank]
        count[device_class] += tp
        if stage.pool_class >= 0:
            count[stage.pool_class] += stage.pool_cards
    return count


def describe(costs: CostTables, stages: Sequence[TemplateStage]) -> str:
    """Return text like ``A100-PCIe-80GB TP2 x1 L40 | P100-PCIe-12GB TP1 x4 L40 (+2 L4 attention workers)``.

    The first stage also counts the layers before the repeated ones.
    """
    parts = []
    for index, stage in enumerate(stages):
        layers = stage.layers + (costs.problem.model.prefix_layers if index == 0 else 0)
        (device_class, size), dp = costs.ranks[stage.rank], costs.rank_dp[stage.rank]
        shared = f" EP{size}" if dp > 1 else ""
        text = f"{costs.classes[device_class].gpu} TP{size // dp} x{dp}{shared} L{layers}"
        if stage.pool_class >= 0:
            text += f" (+{stage.pool_cards} {costs.classes[stage.pool_class].gpu} attention workers)"
        parts.append(text)
    return " | ".join(parts)


# --- time to the first token


class PromptTimes(NamedTuple):
    """Seconds of a replica's iterations with a chunk."""

    round_trip_s: float  # RTc, in the saturated replica
    slot_s: float  # from one to the next, in the saturated replica
    chunk_s: float  # in all stages, alone
    busiest_s: float  # in the stage that takes longest, alone


def prompt_times(costs: CostTables, template: Template) -> PromptTimes:
    """Return the times of a replica that computes prompts."""
    mix = costs.of_scope(template.scope).mixes[template.mix]
    m = costs.problem.family.in_flight[template.in_flight_index]
    slot_s = template.interval_s / mix.iterations
    is_unified = mix.role is Role.UNIFIED
    chunks_s = times_of(template, stage_seconds(costs, template, with_chunk=is_unified))
    if not is_unified:  # all iterations of a prefill replica carry a chunk
        chunks_s = chunks_s / mix.iterations
    trip_s = max(m * slot_s, float(chunks_s.sum()))
    slot_s = max(slot_s, float(chunks_s.max())) if m > 1 else trip_s
    return PromptTimes(trip_s, slot_s, float(chunks_s.sum()), float(chunks_s.max()))


def ttft_s(costs: CostTables, template: Template) -> float:
    """Return p95 TTFT in seconds, without the landing of a prefill replica's KV."""
    own = costs.of_scope(template.scope)
    mix = own.mixes[template.mix]
    if mix.role is Role.DECODE:
        return 0.0
    times = prompt_times(costs, template)
    chunks = mixes.chunks_ahead(own.moments, own.problem.assumptions, mix)
    return mixes.ttft_s(chunks, times.round_trip_s, times.slot_s)


def least_ttft_limit_s(costs: CostTables, template: Template) -> float:
    """Return the least TTFT limit under which the family has this replica, without landing; 0 for decode replicas."""
    own, m = costs.of_scope(template.scope), costs.problem.family.in_flight[template.in_flight_index]
    mix = own.mixes[template.mix]
    trip_s = m * template.interval_s / mix.iterations
    if mix.role is Role.UNIFIED:
        chunks_s = times_of(template, stage_seconds(costs, template, with_chunk=True))
        trip_s = max(trip_s, m * float(chunks_s.max()))
    return mixes.ttft_round_trips(own.moments, own.problem.assumptions, mix, m) * trip_s
