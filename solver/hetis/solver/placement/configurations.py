"""Configurations: the parts of a family that are searched separately."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hetis.solver import cost
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.tables import NO_ROOM, CostTables, Tables
from hetis.solver.plan import Role


@dataclass(frozen=True, slots=True)
class Configuration:
    """A part of the family that is searched on its own: a scope, a mix, M, and how full or uneven the pipeline is.

    ``side`` is the master's side of its replicas. ``max_copies`` bounds the stage copies K of a replica: M = 1 is
    sequential (any K, copies take no turns), M >= 2 K uses the first regime of its role, and M >= K the second. No
    stage of a sequential replica takes more than ``unevenness`` times the mean in an iteration with a chunk.
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
    """Return every configuration of the family, except those that a smaller M serves as well.

    With G GPUs in the fleet K <= G, so the pipeline is full once M >= 2 G whatever its shape. More micro-batches only
    take memory and time, unless a limit on TTFT binds: a prompt is less likely to wait if more are prefilled at once.
    """
    found = []
    family = costs.problem.family
    most_copies = sum(c.available for c in costs.classes)
    for scope, part in enumerate(costs.scopes):
        for mix in (i for i, mix in enumerate(costs.mixes) if part.serves(mix)):
            side = costs.side_of(scope, mix)
            role = costs.mixes[mix].role
            full, tight = costs.regimes(role)
            alone = costs.regime_together(mix)
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
        # Step, hop and ends come on top of layers, and count for most with a single layer.
        fixed_s = t.step_s[x, s]
        chunk_fixed_s = t.chunk.step_s[x, s]
        ends_s, chunk_ends_s = np.zeros(3), np.zeros(3)
        ends_s[0], chunk_ends_s[0] = t.hop_s[x, s], t.chunk.hop_s[x, s]
        ends_s[1], chunk_ends_s[1] = t.hop_s[x, s] + t.last_s[x, s], t.chunk.hop_s[x, s] + t.chunk.last_s[x, s]
        ends_s[2], chunk_ends_s[2] = t.last_s[x, s], t.chunk.last_s[x, s]
        own_s = t.own_s[x, s, t.rank_groups[s]]
        for q in range(-1, t.available.shape[0]):
            if q >= 0 and t.pool_start[s, q] < 0:
                continue
            entries = t.rank_groups[s] * t.pool_sizes.shape[0] if q >= 0 else 1
            for e in range(entries):
                attention_s, chunk_attention_s = own_s, own_s / n_it
                if q >= 0:
                    attention_s = t.pool_s[x, t.pool_start[s, q] + e]
                    chunk_attention_s = t.chunk.pool_s[x, t.pool_start[s, q] + e]
                layer_s, chunk_s = t.layer_s[x, s] + attention_s, t.chunk.layer_s[x, s] + chunk_attention_s
                least = min(least, chunk_s * n_it / layer_s)
                for prefix in range(2):
                    many = 1 + prefix * t.prefix_layers
                    more_s = prefix * t.prefix_layers * t.prefix_delta_s[x, s]
                    chunk_more_s = prefix * t.prefix_layers * t.chunk.prefix_delta_s[x, s]
                    for end in range(3):
                        whole = many * layer_s + more_s + fixed_s + ends_s[end]
                        chunk = many * chunk_s + chunk_more_s + chunk_fixed_s + chunk_ends_s[end]
                        least = min(least, chunk * n_it / whole)
                    least = min(least, (many * chunk_s + chunk_more_s + chunk_fixed_s) * n_it
                                / (many * layer_s + more_s + fixed_s))  # fmt: skip
    return least


def _unevenness_limits(costs: CostTables, scope: int, x: int, f: int) -> Iterator[float]:
    """Yield the limits on unevenness under which sequential replicas are looked for, or inf if TTFT has no limit.

    This omits limits that no stage can keep, that leave no time for the layers, or that a wider one dominates because
    it shortens the interval no more.
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
    levels = [k for k in range(first, at_most + 1) if mean_cap / cost.UNEVENNESS_STEP**k >= fastest_s]
    other_cap = float(t.t_cap[x, f])
    for i, k in enumerate(levels):
        if i + 1 < len(levels) and mean_cap / cost.UNEVENNESS_STEP ** levels[i + 1] >= other_cap:
            continue
        yield cost.UNEVENNESS_STEP**k
