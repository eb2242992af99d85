"""Equal stages of one GPU type: the family of `uniform`, and first plans of other searches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.pipelines import is_run_by_engine
from hetis.solver.placement.replicas.stage_times import FreeTimes, MixSweep, Shape, chunk_caps, free_times, sweep_of
from hetis.solver.placement.replicas.tables import BOTH, FIRST, LAST, PLAIN, CostTables
from hetis.solver.placement.replicas.template import Template, TemplateStage, interval_of

MOST_EQUAL = 2_000  # choices of the nodes of equal stages with different explicit links


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
    t = costs.scopes[scope].tables
    family = costs.problem.family
    most_stages, bests = min(t.num_layers, max(family.in_flight)), dict[tuple[int, int], IntArray]()
    for ranks in _equal_ranks(costs, scope):
        dp, available = costs.rank_dp[ranks[0]], [int(t.available[t.rank_class[s]] // t.rank_tp[s]) for s in ranks]
        for counts in _counts_of_stages(available, most_stages):
            placed = [s for s, count in zip(ranks, counts, strict=True) for _ in range(count)]
            slowest, num_stages = max(placed, key=lambda s: float(t.hop_s[:, s].sum())), len(placed)
            if (num_stages, dp) not in bests:
                bests[num_stages, dp] = _best_mixes(costs, scope, mixes, num_stages, dp)
            x = int(bests[num_stages, dp][slowest])
            if x < 0:
                continue
            layers = _equal_layers(t.num_layers, num_stages)
            cuts = np.cumsum(layers)[:-1]
            if np.any(t.cut_floor[cuts] != cuts):
                continue  # the model does not allow these cuts
            stages = tuple(TemplateStage(rank=s, layers=n) for s, n in zip(placed, layers, strict=True))
            template = Template(scope, x, num_stages - 1, stages, np.inf)
            if is_run_by_engine(costs, template):
                yield replace(template, interval_s=interval_of(costs, template))


def _equal_layers(num_layers: int, num_stages: int) -> list[int]:
    """Return the layers of equal stages; the remainder goes to plain stages first, then to the first, then the last."""
    each, spare = divmod(num_layers, num_stages)
    takers = [*range(1, num_stages - 1), 0, num_stages - 1][:spare] if num_stages > 1 else []
    return [each + (1 if i in takers else 0) for i in range(num_stages)]


def _best_mixes(costs: CostTables, scope: int, mixes: IntArray, num_stages: int, attention_dp: int) -> IntArray:
    """Return the mix of the shortest interval for equal stages of each rank type, -1 if none fits and is in time; [S].

    The mix is one of ``mixes``.
    """
    t, found = costs.scopes[scope].tables, np.full(len(costs.ranks), -1, dtype=np.int64)
    own = mixes[[costs.mixes[x].attention_dp == attention_dp for x in mixes]]
    ranks = np.flatnonzero(np.array(costs.rank_dp) == attention_dp)
    if not len(own) or (attention_dp > 1 and num_stages > 1):
        return found
    shape = Shape(scope, num_stages, ranks, np.zeros((0, len(ranks)), dtype=np.int64))
    key = "equal", scope, num_stages, attention_dp, own.tobytes()
    known: tuple[MixSweep, FreeTimes] | None = costs.shared.get(key)  # from another utilisation
    if known is None:
        sweep = sweep_of(costs.of_scope(scope), num_stages, own, np.zeros(1, dtype=np.int64))
        known = costs.shared[key] = sweep, free_times(costs, shape, sweep, None)
    sweep, free = known
    times = free.within(chunk_caps(costs, shape, sweep))
    layers = _equal_layers(t.num_layers, num_stages)
    of_role = (
        {BOTH: layers[0]}
        if num_stages == 1
        else {FIRST: layers[0], PLAIN: max(layers[1:-1], default=0), LAST: layers[-1]}
    )
    roles = [role for role, n in of_role.items() if role != PLAIN or num_stages > 2]
    held = np.array([of_role[role] for role in roles])
    longest_s = (held * times.layer_s[:, :, None] + times.fixed_s[:, :, roles]).max(axis=2)
    fits = np.all((held >= 1) & (held <= times.most[:, :, roles]), axis=2)
    fits &= longest_s <= t.t_cap[own, shape.in_flight_index][:, None]
    longest_s = np.where(fits, longest_s, np.inf)
    found[ranks] = np.where(np.isfinite(longest_s).any(axis=0), own[longest_s.argmin(axis=0)], -1)
    return found


def _equal_ranks(costs: CostTables, scope: int) -> list[list[int]]:
    """Return the rank types of a scope, together those of classes that differ only in their links to single nodes."""
    found = dict[Hashable, list[int]]()
    for s, (device_class, size) in enumerate(costs.ranks):
        if costs.scopes[scope].computes_on(device_class):
            c = costs.classes[device_class]
            alike = replace(c, block=0, node_links=(), groups=())
            found.setdefault((alike, size, costs.rank_dp[s]), []).append(s)
    return list(found.values())


def _counts_of_stages(most: Sequence[int], most_stages: int) -> Iterator[tuple[int, ...]]:
    """Yield how many equal stages are of each rank type: all choices, or with too many, those of a single type."""
    used = [i for i, count in enumerate(most) if count]
    several = math.prod(1 + min(most[i], most_stages) for i in used) <= MOST_EQUAL
    for counts in itertools.product(*(range(1 + (min(count, most_stages))) for count in most)) if several else ():
        if 0 < sum(counts) <= most_stages:
            yield counts
    for i in () if several else used:
        for count in range(1, 1 + min(most[i], most_stages)):
            yield tuple(count if i == j else 0 for j in range(len(most)))
