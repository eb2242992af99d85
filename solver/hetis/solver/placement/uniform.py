"""Equal stages of one GPU type, compiled, as engines build them: the family of `uniform`, and others' first columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hetis.solver.cost import UNEVENNESS_STEP, Regime
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.options import ROUNDING, iterations_of, layers_on_rank, stretch
from hetis.solver.placement.pipelines import is_run_by_engine
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, CostTables, Tables
from hetis.solver.placement.template import Template, TemplateStage, interval_of


@kernel
def _equal_layers(num_layers: int, num_stages: int, role: int) -> int:
    """Return the layers of a stage; the remainder goes to plain stages first, then to the first, then to the last."""
    each, spare = num_layers // num_stages, num_layers % num_stages
    if role == FIRST:
        return each + (1 if spare > max(0, num_stages - 2) else 0)
    if role == PLAIN:
        return each + (1 if spare > 0 else 0)  # the larger number among plain stages
    return each


@kernel
def best_equal_split(
    t: Tables,
    mixes: IntArray,
    s: int,
    num_stages: int,
    full: Regime,
    tight: Regime,
    together: Regime,
    depth_in_flight: bool,
) -> tuple[float, int, int]:
    """Return the shortest interval of ``num_stages`` equal stages of rank type s, with its mix and in-flight index.

    The mix is one of ``mixes``. The interval is inf if nothing fits in memory or meets the limits.
    """
    best, best_x, best_f = np.inf, -1, -1
    kinds = 1 if num_stages == 1 else (2 if num_stages == 2 else 3)
    groups = t.rank_groups[s]
    # The remainder goes to plain stages first, and may be less than their number.
    many_plain = 0 < t.num_layers % num_stages < num_stages - 2
    for x in mixes:
        if t.gives_all[x]:
            continue
        compute_s = t.layer_s[x, s] + t.own_s[x, s, groups]
        w = max(compute_s, t.wire_s[x, s])
        prefix_s = t.prefix_layers * max(compute_s + t.prefix_delta_s[x, s], t.wire_s[x, s])
        chunk_w = t.chunk.layer_s[x, s] + t.own_s[x, s, groups] / t.iterations[x]
        chunk_prefix_s = t.prefix_layers * (chunk_w + t.chunk.prefix_delta_s[x, s])
        for f in range(t.in_flight.shape[0]):
            m = t.in_flight[f]
            if 1 < m < num_stages or (depth_in_flight and m != num_stages):
                continue
            if t.rank_dp[s] > 1 and (m > 1 or num_stages > 1):
                continue
            kept = groups * t.kv_group_bytes * t.kv_tokens[x, f, 0] + t.state_bytes[x, f, 0] / t.rank_tp[s]
            busiest, total, fits = 0.0, 0.0, True
            chunk_s, uneven = 0.0, 1.0
            for kind in range(kinds):
                role = BOTH if num_stages == 1 else (FIRST, LAST, PLAIN)[kind]
                layers = _equal_layers(t.num_layers, num_stages, role)
                if layers < 1 or layers > layers_on_rank(t, x, s, kept, role):
                    fits = False
                    break
                fixed, chunk_fixed = t.step_s[x, s], t.chunk.step_s[x, s]
                if role in (FIRST, BOTH):
                    fixed, chunk_fixed = fixed + prefix_s, chunk_fixed + chunk_prefix_s
                else:
                    fixed, chunk_fixed = fixed + t.hop_s[x, s], chunk_fixed + t.chunk.hop_s[x, s]
                if role in (LAST, BOTH):
                    fixed, chunk_fixed = fixed + t.last_s[x, s], chunk_fixed + t.chunk.last_s[x, s]
                chunk_s = max(chunk_s, layers * chunk_w + chunk_fixed)
                # Some plain stages may have one layer less, which gives the rest of the stage more weight.
                for n in range(max(1, layers - 1) if role == PLAIN and many_plain else layers, layers + 1):
                    uneven = max(uneven, (n * chunk_w + chunk_fixed) * t.iterations[x] / (n * w + fixed))
                busiest = max(busiest, layers * w + fixed)
                if role != PLAIN:
                    total += layers * w + fixed
                else:
                    ends = _equal_layers(t.num_layers, num_stages, FIRST) + _equal_layers(
                        t.num_layers, num_stages, LAST
                    )
                    total += (t.num_layers - ends) * w + (num_stages - 2) * fixed
            if not fits:
                continue
            if m == 1:
                interval = total
                if t.rank_dp[s] > 1:
                    interval *= stretch(iterations_of(t, x, f), w, chunk_w, together.least, together.unevenness)
            else:
                regime = full if m >= 2 * num_stages else tight
                interval = stretch(iterations_of(t, x, f), w, chunk_w, regime.least, regime.unevenness) * max(
                    busiest, total / m
                )
            interval = max(interval, t.t_floor)
            if t.trip_cap[x, f] < np.inf:
                if m == 1 and not depth_in_flight:
                    limit = UNEVENNESS_STEP ** np.ceil(np.log(uneven) / np.log(UNEVENNESS_STEP) - ROUNDING)
                    in_time = interval <= t.trip_cap[x, f] * t.iterations[x] / limit
                else:
                    copies = m // 2 if m >= 2 * num_stages else m
                    in_time = chunk_s * copies <= t.trip_cap[x, f]
                if not in_time:
                    continue
            if interval <= t.t_cap[x, f] and interval < best:
                best, best_x, best_f = interval, x, f
    return best, best_x, best_f


def uniform_templates(costs: CostTables) -> list[Template]:
    """Return the best replica of every rank type and number of equal stages that fits in the fleet, on every side."""
    found: list[Template] = []
    for scope, part in enumerate(costs.scopes):
        mixes_on: dict[int, list[int]] = {}
        for x in (x for x, mix in enumerate(costs.mixes) if part.serves(mix)):
            mixes_on.setdefault(costs.side_of(scope, x), []).append(x)
        for mixes in mixes_on.values():
            found.extend(_equal_stages(costs, scope, np.array(mixes, dtype=np.int64)))
    return found


def _equal_stages(costs: CostTables, scope: int, mixes: IntArray) -> Iterator[Template]:
    t, regimes = costs.scopes[scope].tables, costs.regimes(costs.mixes[mixes[0]].role)
    degrees = np.array([mix.attention_dp for mix in costs.mixes])[mixes]
    family = costs.problem.family
    most_stages = min(t.num_layers, max(family.in_flight))
    for s, (device_class, tp) in enumerate(costs.ranks):
        if not costs.scopes[scope].computes_on(device_class):
            continue
        own = mixes[degrees == costs.rank_dp[s]]
        together = costs.regime_together(own[0])
        for num_stages in range(1, min(most_stages, int(t.available[device_class]) // tp) + 1):
            _, x, f = best_equal_split(t, own, s, num_stages, *regimes, together, family.engine is not None)
            if x < 0:
                continue
            each, spare = divmod(t.num_layers, num_stages)
            takers = [*range(1, num_stages - 1), 0, num_stages - 1][:spare] if num_stages > 1 else []
            stages = tuple(
                TemplateStage(rank=s, copies=1, layers=each + (1 if i in takers else 0)) for i in range(num_stages)
            )
            cuts = np.cumsum([stage.layers for stage in stages])[:-1]
            if np.any(t.cut_floor[cuts] != cuts):
                continue  # the model does not allow these cuts
            template = Template(scope, x, f, stages, np.inf)
            if is_run_by_engine(costs, template):
                yield replace(template, interval_s=interval_of(costs, template))
