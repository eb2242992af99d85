"""Templates, which are replicas without named GPUs, and configurations, the parts of a family searched separately.

All round trips of a prompt carry a chunk, so a limit on TTFT is a limit on ``RTc = max(M t / n_it, sum_s chunk_s)``
(`docs/cost-model.md`, "Latency"). The first term is a cap on t. The second would couple the stages, so the family
enforces it by a rule for each stage of a replica with several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver import cost
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.stage_cost import (
    ROUNDING,
    iterations_of,
    kept_bytes,
    layers_on_card,
    layers_on_rank,
    pool_entry,
    stretch,
)
from hetis.solver.placement.tables import BOTH, FIRST, LAST, NO_ROOM, PLAIN, CostTables, Tables
from hetis.solver.plan import Role


@dataclass(frozen=True, slots=True)
class Configuration:
    """A part of the family that is searched on its own: a scope, a mix, M, and how full or uneven the pipeline is.

    ``side`` is the master's side of its replicas. ``max_copies`` bounds the stage copies K of a replica: M = 1 is
    sequential (any K, copies take no turns), M >= 2 K uses the first regime of its role, and M >= K the second. Of a
    sequential replica with several stages, none takes more than ``unevenness`` times the mean in an iteration with a
    chunk.
    """

    scope: int
    mix: int
    in_flight_index: int
    in_flight: int
    max_copies: int
    regime: cost.Regime
    side: int
    unevenness: float = np.inf

    @property
    def is_sequential(self) -> bool:
        return self.in_flight == 1


def configurations(costs: CostTables) -> list[Configuration]:
    """Return every configuration of the family, except those for which a smaller M is as good.

    With G GPUs in the fleet K <= G, so the pipeline is full once M >= 2 G whatever its shape. More micro-batches only
    take memory and time, unless a limit on TTFT binds: a prompt is less likely to wait if more are prefilled at once.
    """
    found, family, most_copies = [], costs.problem.family, sum(c.available for c in costs.classes)
    for scope, part in enumerate(costs.scopes):
        for mix in (i for i, mix in enumerate(costs.mixes) if part.serves(mix)):
            side, role = costs.side_of(scope, mix), costs.mixes[mix].role
            (full, tight), alone = costs.regimes(role), costs.regime_together(mix)
            limited = costs.problem.objective.ttft_limit_s is not None and costs.mixes[mix].chunk_tokens > 0
            filled = False
            for f, m in sorted(enumerate(family.in_flight), key=lambda pair: pair[1]):
                if family.engine_settings and not (part.tables.kv_tokens[mix, f] < NO_ROOM).any():
                    continue
                if m == 1:
                    for unevenness in _unevenness_limits(costs, scope, mix, f):
                        found.append(Configuration(scope, mix, f, m, 1 << 20, alone, side, unevenness))
                elif not filled and costs.mixes[mix].attention_dp == 1:
                    filled = m >= 2 * most_copies and not limited
                    # Without rules for chunks and with equal slack, this is part of the other configuration.
                    if filled or full != tight or role is Role.UNIFIED:
                        found.append(Configuration(scope, mix, f, m, m // 2, full, side))
                    if not filled:
                        found.append(Configuration(scope, mix, f, m, m, tight, side))
    return found


@kernel
def _least_unevenness(t: Tables, x: int) -> float:
    """Return the least unevenness that any stage of mix x has in an iteration with a chunk."""
    n_it, least = t.iterations[x], np.inf
    for s in range(t.rank_class.shape[0]):
        if t.available[t.rank_class[s]] < t.rank_tp[s] or t.layer_s[x, s] == np.inf:
            continue
        # Step, hop and ends add to the layers, and count for most with a single layer.
        fixed_s, chunk_fixed_s = t.step_s[x, s], t.chunk.step_s[x, s]
        hop_s, last_s = t.hop_s[x, s], t.last_s[x, s]
        chunk_hop_s, chunk_last_s = t.chunk.hop_s[x, s], t.chunk.last_s[x, s]
        ends_s = (0.0, hop_s, hop_s + last_s, last_s)
        chunk_ends_s = (0.0, chunk_hop_s, chunk_hop_s + chunk_last_s, chunk_last_s)
        own_s, chunk_own_s = t.own_s[x, s, t.rank_groups[s]], t.chunk.own_s[x, s, t.rank_groups[s]]
        for q in range(-1, t.available.shape[0]):
            if q >= 0 and t.pool_start[s, q] < 0:
                continue
            entries = t.rank_groups[s] * t.pool_sizes.shape[0] if q >= 0 else 1
            for e in range(entries):
                attention_s, chunk_attention_s = own_s, chunk_own_s
                if q >= 0:
                    attention_s = t.pool_s[x, t.pool_start[s, q] + e]
                    chunk_attention_s = t.chunk.pool_s[x, t.pool_start[s, q] + e]
                layer_s, chunk_s = t.layer_s[x, s] + attention_s, t.chunk.layer_s[x, s] + chunk_attention_s
                least = min(least, chunk_s * n_it / layer_s)
                for prefix in range(2):
                    many = 1 + prefix * t.prefix_layers
                    more_s = prefix * t.prefix_layers * t.prefix_delta_s[x, s]
                    chunk_more_s = prefix * t.prefix_layers * t.chunk.prefix_delta_s[x, s]
                    for end in range(4):
                        whole = many * layer_s + more_s + fixed_s + ends_s[end]
                        chunk = many * chunk_s + chunk_more_s + chunk_fixed_s + chunk_ends_s[end]
                        least = min(least, chunk * n_it / whole)
    return least


def _unevenness_limits(costs: CostTables, scope: int, x: int, f: int) -> Iterator[float]:
    """Yield the limits on unevenness under which sequential replicas are searched for, or inf if TTFT has no limit.

    The first leaves the interval as long as possible, for replicas of a single stage, which none of them concerns. Of
    the others, this omits limits that no stage can meet, that leave no time for the layers, or that a wider one
    dominates because it does not shorten the interval more.
    """
    t = costs.scopes[scope].tables
    if not np.isfinite(t.trip_cap[x, f]):
        yield np.inf
        return
    here = (t.available[t.rank_class] >= t.rank_tp) & np.isfinite(t.layer_s[x])
    if not np.any(here):
        return
    fastest_s = t.num_layers * float(t.layer_s[x, here].min())
    mean_cap = float(t.trip_cap[x, f] * t.iterations[x])
    at_most = cost.unevenness_level(t.iterations[x] / costs.mixes[x].chunk_iterations)  # all time in chunks
    first = cost.unevenness_level(max(1.0, _least_unevenness(t, x) * (1.0 - 1e-9)))
    each = sorted({0, *range(first, at_most + 1)})
    levels = [k for k in each if mean_cap / cost.UNEVENNESS_STEP**k >= fastest_s]
    other_cap = float(t.t_cap[x, f])
    for i, k in enumerate(levels):
        if i + 1 < len(levels) and mean_cap / cost.UNEVENNESS_STEP ** levels[i + 1] >= other_cap:
            continue
        yield cost.UNEVENNESS_STEP**k


# --- templates


@dataclass(frozen=True, slots=True)
class TemplateStage:
    """c TP groups of rank type s with l repeated layers each copy; p cards of class q per copy take k groups."""

    rank: int
    copies: int
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
    def num_copies(self) -> int:
        return sum(stage.copies for stage in self.stages)

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


def template_of(costs: CostTables, configuration: Configuration, rows: IntArray) -> Template:
    """Return the rows of `stage_rows` as a template, at the exact interval of its best layer split."""
    parts = tuple(
        TemplateStage(rank, copies, layers, pool_class, *((cards, groups) if pool_class >= 0 else (0, 0)))
        for rank, copies, layers, pool_class, cards, groups in rows.tolist()
    )
    rough = Template(configuration.scope, configuration.mix, configuration.in_flight_index, parts, np.inf)
    rough = replace(rough, interval_s=interval_of(costs, rough))
    return rebalanced(costs, rough)


def roles(count: int) -> list[int]:
    """Return the roles of ``count`` stages in order."""
    if count == 1:
        return [BOTH]
    return [FIRST] + [PLAIN] * (count - 2) + [LAST]


def stage_seconds(costs: CostTables, template: Template, *, with_chunk: bool = False) -> list[tuple[float, float]]:
    """Return (w, fixed) of every stage: a stage with l repeated layers takes ``l w + fixed`` seconds per request.

    With ``with_chunk``, return those of one iteration with a chunk, in a unified replica, where no KV is on the wire.
    """
    t, x, result = costs.scopes[template.scope].tables, template.mix, []
    times = t.chunk if with_chunk else t
    for stage, role in zip(template.stages, roles(len(template.stages)), strict=True):
        s = stage.rank
        if stage.pool_class < 0:
            compute_s, wire_s = times.layer_s[x, s] + times.own_s[x, s, t.rank_groups[s]], t.wire_s[x, s]
        else:
            entry = pool_entry(t, s, stage.pool_class, stage.pool_groups, costs.pool_sizes.index(stage.pool_cards))
            compute_s = times.layer_s[x, s] + times.pool_s[x, entry]
            wire_s = t.pool_wire_s[entry] if t.receives[x] else 0.0
        wire_s = 0.0 if with_chunk else wire_s
        fixed = float(times.step_s[x, s])
        if role in (PLAIN, LAST):
            fixed += times.hop_s[x, s]
        else:
            fixed += t.prefix_layers * max(compute_s + times.prefix_delta_s[x, s], wire_s)
        if role in (LAST, BOTH):
            fixed += times.last_s[x, s]
        result.append((float(max(compute_s, wire_s)), float(fixed)))
    return result


def times_of(template: Template, seconds: Sequence[tuple[float, float]]) -> list[float]:
    """Return the seconds of every stage with its layers, given (seconds per layer, fixed)."""
    return [stage.layers * w + fixed for stage, (w, fixed) in zip(template.stages, seconds, strict=True)]


def slacked_seconds(costs: CostTables, template: Template) -> list[tuple[float, float]]:
    """Return `stage_seconds` stretched by the slack of each stage."""
    t, m = costs.scopes[template.scope].tables, costs.problem.family.in_flight[template.in_flight_index]
    of_role = costs.regimes(costs.mixes[template.mix].role)
    regime = cost.regime_of(of_role, in_flight=m, num_copies=template.num_copies)
    if m == 1:
        regime = costs.regime_together(template.mix)
    mix = iterations_of(t, template.mix, template.in_flight_index)
    plain, chunks = stage_seconds(costs, template), stage_seconds(costs, template, with_chunk=True)
    longer = [stretch(mix, w, chunk_s, *regime) for (w, _), (chunk_s, _) in zip(plain, chunks, strict=True)]
    return [(ratio * w, ratio * fixed) for ratio, (w, fixed) in zip(longer, plain, strict=True)]


def interval_of(costs: CostTables, template: Template) -> float:
    """Return t of `docs/cost-model.md`."""
    times = times_of(template, slacked_seconds(costs, template))
    m = costs.problem.family.in_flight[template.in_flight_index]
    busiest = max(u / stage.copies for stage, u in zip(template.stages, times, strict=True))
    return max(busiest, sum(times) / m, costs.scopes[template.scope].tables.t_floor)


def with_fewest_in_flight(costs: CostTables, template: Template) -> Template:
    """Return a prefill replica with no more micro-batches than its rate needs; leave others, and any with a TTFT limit.

    KV in flight occupies room twice, because a prompt's KV has its place on the decode replica from the beginning.
    """
    if costs.mixes[template.mix].role is not Role.PREFILL or costs.problem.objective.ttft_limit_s is not None:
        return template
    for index, m in sorted(enumerate(costs.problem.family.in_flight), key=lambda pair: pair[1]):
        fewer = replace(template, in_flight_index=index)
        if m >= template.num_copies and math.isclose(interval_of(costs, fewer), template.interval_s, rel_tol=1e-12):
            return fewer
    return template


def rebalanced(costs: CostTables, template: Template) -> Template:
    """Return the same stages with the split of layers that makes the interval shortest.

    This applies to pipelined replicas of models that may be cut anywhere; others come from the search with their best
    split. The interval is lowered as long as the layers that fit in every stage within it cover the model.
    """
    m = costs.problem.family.in_flight[template.in_flight_index]
    if m == 1 or len(template.stages) == 1 or costs.problem.model.forbidden_cuts:
        return template
    times = slacked_seconds(costs, template)
    rooms = [room_layers(costs, template, i) for i in range(len(template.stages))]
    trip_cap = float(costs.scopes[template.scope].tables.trip_cap[template.mix, template.in_flight_index])
    if np.isfinite(trip_cap):
        longest_s = trip_cap / cost.most_copies(m, template.num_copies)
        chunks = stage_seconds(costs, template, with_chunk=True)
        in_time = [(stage.copies * longest_s - f) / s for stage, (s, f) in zip(template.stages, chunks, strict=True)]
        rooms = [min(room, int(max(0.0, n + ROUNDING))) for room, n in zip(rooms, in_time, strict=True)]
    total = sum(stage.layers for stage in template.stages)
    best = template
    while True:
        target = best.interval_s * (1.0 - 1e-12)
        fits = [
            min(room, int((stage.copies * target - fixed) / w)) if stage.copies * target > fixed else 0
            for room, stage, (w, fixed) in zip(rooms, best.stages, times, strict=True)
        ]
        if min(fits) < 1 or sum(fits) < total:
            return best
        spare = sum(fits) - total
        order = sorted(range(len(fits)), key=lambda i: -times[i][0] / best.stages[i].copies)
        while spare > 0:  # take layers from where they cost most, but leave one layer per stage
            for i in order:
                if spare > 0 and fits[i] > 1:
                    given = min(spare, max(1, (fits[i] - 1) // 2))
                    fits[i] -= given
                    spare -= given
        stages = (replace(stage, layers=n) for stage, n in zip(best.stages, fits, strict=True))
        candidate = replace(best, stages=tuple(stages))
        interval = interval_of(costs, candidate)
        if not interval < best.interval_s:
            return best
        best = replace(candidate, interval_s=interval)


def kv_tokens_held(costs: CostTables, template: Template, stage: TemplateStage) -> tuple[int, float]:
    """Return (D, Tkv) of a stage: the micro-batches whose KV one copy holds, and their tokens."""
    t, f = costs.scopes[template.scope].tables, template.in_flight_index
    return -(-int(t.in_flight[f]) // stage.copies), float(t.kv_tokens[template.mix, f, stage.copies - 1])


def fixed_bytes(costs: CostTables, template: Template, index: int) -> float:
    """Return the bytes of a rank that do not grow with repeated layers or KV: activations, ends, prefix weights."""
    t = costs.scopes[template.scope].tables
    s, x, role = template.stages[index].rank, template.mix, roles(len(template.stages))[index]
    f = template.in_flight_index
    total = float(t.act_bytes[x, f, s])
    if role in (FIRST, BOTH):
        total += t.first_bytes[s]
    if role in (LAST, BOTH):
        total += t.last_bytes[s] + t.logit_bytes[x, f, s]
    if role == BOTH:
        total -= t.tied_bytes[s]
    return total


def room_layers(costs: CostTables, template: Template, index: int) -> int:
    """Return the repeated layers that fit in memory on a stage (and its pool)."""
    t = costs.scopes[template.scope].tables
    stage, role = template.stages[index], roles(len(template.stages))[index]
    held, tokens = kv_tokens_held(costs, template, stage)
    kept = kept_bytes(t, template.mix, template.in_flight_index, stage.rank, stage.copies, stage.pool_groups)
    layers = layers_on_rank(t, template.mix, template.in_flight_index, stage.rank, kept, role)
    if stage.pool_class >= 0:
        requests, tp = held * int(t.micro_batch[template.mix]), int(t.rank_tp[stage.rank])
        on_card = layers_on_card(
            t.worker_room_bytes[stage.pool_class], t.kv_group_bytes, tp, stage.pool_groups, stage.pool_cards, requests,
            tokens,
        )  # fmt: skip
        layers = min(layers, on_card - (t.prefix_layers if index == 0 else 0))
    return max(0, int(layers))


def use_of(costs: CostTables, template: Template) -> IntArray:
    """Return how much a template takes of every master row, shape [rows]."""
    use = np.zeros(len(costs.resources.rows), dtype=np.int64)
    for stage in template.stages:
        use += stage.copies * costs.group_use[stage.rank]
        if stage.pool_class >= 0:
            use += stage.copies * stage.pool_cards * costs.card_use[stage.pool_class]
    return use


def zones_of(costs: CostTables, template: Template) -> list[int]:
    """Return the zones of a template's GPUs, by their numbers in `Routes`, where whole zones come first."""
    names = {costs.classes[device_class].zone for device_class in gpus_of(costs, template)}
    return [z for z, name in enumerate(costs.routes.whole_zones) if name in names]


def landing_s(costs: CostTables, template: Template) -> float:
    """Return the seconds that landing the KV of a prompt's last chunk adds to TTFT, from the slowest stage."""
    landing = costs.scopes[template.scope].tables.landing_s
    return float(max(landing[template.mix, stage.rank] for stage in template.stages))


def gpus_of(costs: CostTables, template: Template) -> Counter[int]:
    """Return the GPUs of each class that a template takes."""
    count: Counter[int] = Counter()
    for stage in template.stages:
        device_class, tp = costs.ranks[stage.rank]
        count[device_class] += stage.copies * tp
        if stage.pool_class >= 0:
            count[stage.pool_class] += stage.copies * stage.pool_cards
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
        text = f"{costs.classes[device_class].gpu} TP{size // dp} x{stage.copies * dp}{shared} L{layers}"
        if stage.pool_class >= 0:
            text += f" (+{stage.pool_cards} {costs.classes[stage.pool_class].gpu} attention workers)"
        parts.append(text)
    return " | ".join(parts)


# --- time to the first token


def ttft_s(costs: CostTables, template: Template) -> float:
    """Return p95 TTFT in seconds, without the landing of a prefill replica's KV."""
    mix, m = costs.mixes[template.mix], costs.problem.family.in_flight[template.in_flight_index]
    if mix.role is Role.DECODE:
        return 0.0
    trip_s = m * template.interval_s / mix.iterations
    if mix.role is Role.UNIFIED:  # all round trips of a prefill replica carry a chunk
        trip_s = max(trip_s, sum(times_of(template, stage_seconds(costs, template, with_chunk=True))))
    return cost.ttft_round_trips(costs.moments, costs.problem.assumptions, mix, m) * trip_s


def least_ttft_limit_s(costs: CostTables, template: Template) -> float:
    """Return the least TTFT limit under which the family has this replica, without landing; 0 for decode replicas."""
    mix, m = costs.mixes[template.mix], costs.problem.family.in_flight[template.in_flight_index]
    trip_s = m * template.interval_s / mix.iterations
    if mix.role is Role.UNIFIED:
        chunks_s = times_of(template, stage_seconds(costs, template, with_chunk=True))
        if m == 1 and len(chunks_s) == 1:
            trip_s = max(trip_s, chunks_s[0])
        elif m == 1:
            uneven = max(
                mix.iterations * chunk_s / u
                for chunk_s, u in zip(chunks_s, times_of(template, stage_seconds(costs, template)), strict=True)
            )
            trip_s *= cost.UNEVENNESS_STEP ** cost.unevenness_level(uneven)
        else:
            busiest_s = max(s / stage.copies for stage, s in zip(template.stages, chunks_s, strict=True))
            trip_s = max(trip_s, cost.most_copies(m, template.num_copies) * busiest_s)
    return cost.ttft_round_trips(costs.moments, costs.problem.assumptions, mix, m) * trip_s
