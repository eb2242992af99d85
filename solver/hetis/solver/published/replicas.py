"""The best replica on given GPUs under our cost model: TP sizes, pipeline, layers and setting, by enumeration.

Prefill replicas take the shape with the lowest latency of a prompt, others the one with the highest rate (as HexGen-2
does). (b, M, C) and the layers then follow from our family under the objective's limits, for the highest rate.
Reconstructed: each GPU type has one TP degree, with the rest of a node in smaller powers of two; stages of one type are
consecutive; groups of up to three types try every order of the types, others go from the roomiest to the tightest.

A *setting* is a mix x and a number of micro-batches in flight (index f). Stages are in order, each one TP group.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations, product
from typing import NamedTuple

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.cluster import Cluster
from hetis.solver.mixes import Regime
from hetis.solver.placement.fleet import DeviceClass, IntArray, class_of_slots
from hetis.solver.placement.replicas.pipelines import split_layers
from hetis.solver.placement.replicas.stage_cost import (
    ROUNDING,
    Iterations,
    kept_bytes,
    layers_on_rank,
    slack,
    stage_roles,
)
from hetis.solver.placement.replicas.tables import BoolArray, CostTables, FloatArray
from hetis.solver.placement.replicas.template import Template, TemplateStage
from hetis.solver.plan import Role

FIRST_SETTINGS = 32  # settings that are tried together at first
MAX_ORDERED_TYPES = 3  # number of types of a group up to which every order is tried

Part = tuple[int, ...]  # GPUs, or other vertices of a graph, ascending
Ranks = tuple[int, ...]  # rank type (index into `CostTables.ranks`) of every stage in order
# The composition of a group: for every device class, the number of GPUs on each of its nodes, most first.
Composition = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class FleetGpus:
    """N GPUs in the order of the cluster."""

    names: tuple[str, ...]
    nodes: tuple[str, ...]  # name of each GPU's node
    zones: tuple[str, ...]  # zone of each GPU
    device_class: IntArray  # [N] index into the device classes
    room_bytes: FloatArray  # [N] bytes for weights and KV

    @classmethod
    def of(cls, cluster: Cluster, classes: tuple[DeviceClass, ...], room_bytes: Iterable[float]) -> FleetGpus:
        """Return the GPUs of a cluster; ``room_bytes`` is the memory of each class's GPUs for weights and KV."""
        devices, class_of = tuple(cluster.devices()), class_of_slots(classes)
        device_class = np.array([class_of[d.group.name, d.gpu] for d in devices], dtype=np.int64)
        return cls(
            names=tuple(d.name for d in devices),
            nodes=tuple(d.node for d in devices),
            zones=tuple(d.group.zone for d in devices),
            device_class=device_class,
            room_bytes=np.array(list(room_bytes))[device_class],
        )

    def kind(self, gpu: int) -> tuple[int, str]:
        """Return the kind of a GPU, its device class and node; GPUs of one kind are interchangeable."""
        return int(self.device_class[gpu]), self.nodes[gpu]

    def of_zone(self, zone: str) -> Part:
        return tuple(gpu for gpu, other in enumerate(self.zones) if other == zone)

    def composition(self, gpus: Sequence[int]) -> Composition:
        """Return all that the best replica of a group depends on: its classes, and how many GPUs share each node."""
        counted: dict[int, Counter[str]] = defaultdict(Counter)
        for gpu in gpus:
            device_class, node = self.kind(gpu)
            counted[device_class][node] += 1
        return tuple((c, tuple(sorted(counted[c].values(), reverse=True))) for c in sorted(counted))


@dataclass(frozen=True, slots=True)
class ReplicaDuty:
    """The role and zone of the replicas to find, and the mixes of the family that serve them."""

    role: Role
    scope: int  # index into `CostTables.scopes`, of one zone
    mixes: tuple[int, ...]  # indices into `CostTables.mixes`


def duty_of(costs: CostTables, role: Role, zone: str, *, sends_afar: bool = False) -> ReplicaDuty:
    """Return the duty of a role in a zone; with ``sends_afar`` a prefill replica may send KV to all zones."""
    scope = next(i for i, scope in enumerate(costs.scopes) if scope.zones == (zone,) and role in scope.roles)
    afar = sends_afar and role is Role.PREFILL
    mixes = [x for x, mix in enumerate(costs.mixes) if mix.role is role and mix.sends_afar == afar]
    return ReplicaDuty(role, scope, tuple(mixes))


@dataclass(slots=True)
class ReplicaSearch:
    """A search for the best replica of groups, equal groups once; without ``keeps_limits``, latency is ignored.

    Once the budget is spent, it knows the replicas found so far, and no others.
    """

    costs: CostTables
    budget: Budget = field(default_factory=Budget)
    keeps_limits: bool = True
    _found: dict[tuple[Composition, ReplicaDuty], Template | None] = field(default_factory=dict)

    def best_replica(self, group: Composition, duty: ReplicaDuty) -> Template | None:
        """Return the replica on all GPUs of a group or, if none fits, on those of some of its types.

        Return None if no shape fits in memory and meets the limits.
        """
        key = group, duty
        if key not in self._found:
            sizes = range(len(group), 0, -1)
            candidates = ([self._of_all(part, duty) for part in combinations(group, size)] for size in sizes)
            self._found[key] = next((best for found in candidates if (best := fastest(found)) is not None), None)
        return self._found[key]

    def _of_all(self, group: Composition, duty: ReplicaDuty) -> Template | None:
        """Return the replica of a group that uses all its types."""
        num_layers = self.costs.scopes[duty.scope].tables.num_layers
        shapes = [shape for shape in self.shapes(group) if len(shape) <= num_layers]
        if duty.role is not Role.PREFILL:
            return fastest(self.at_best_setting(shape, duty) for shape in shapes if not self.budget.is_spent())
        # By latency: the first shape within the limits is taken, whatever the rates of the others.
        in_time = (i for i in range(len(shapes)) if not self.budget.is_spent())
        timed = sorted((self._latency_s(shapes[i], duty), i) for i in in_time)
        found = (self.at_best_setting(shapes[i], duty) for latency_s, i in timed if latency_s < np.inf)
        return next((template for template in found if template is not None), None)

    def shapes(self, group: Composition) -> Iterator[Ranks]:
        """Yield TP groups in stage order, for every TP degree per type and, if there are few types, every order."""
        costs, rank_of = self.costs, {rank: s for s, rank in enumerate(self.costs.ranks)}
        sizes = [sorted({tp for c, tp in costs.ranks if c == g and tp <= nodes[0]}) for g, nodes in group]
        room = [costs.problem.profiles[costs.classes[g].gpu].room_bytes for g, _ in group]
        by_room = tuple(sorted(range(len(group)), key=lambda i: (-room[i], i)))
        for order in permutations(range(len(group))) if len(group) <= MAX_ORDERED_TYPES else (by_room,):
            for chosen in product(*(sizes[i] for i in order)):
                stages: list[int] = []
                for i, most in zip(order, chosen, strict=True):
                    device_class, nodes = group[i]
                    tps = [tp for count in nodes for tp in tp_groups(count, [n for n in sizes[i] if n <= most])]
                    stages += [rank_of[device_class, tp] for tp in sorted(tps, reverse=True)]
                yield tuple(stages)

    def _latency_s(self, shape: Ranks, duty: ReplicaDuty) -> float:
        """Return seconds of a mean prompt that is alone in the pipeline (or among as few as the family allows)."""
        p = pipeline_of(self.costs, duty, shape)
        alone = p.unlimited_at(int(np.argmin(p.in_flight)))
        return float(best_split(alone).interval_s * alone.in_flight[0])

    def at_best_setting(self, shape: Ranks, duty: ReplicaDuty) -> Template | None:
        """Return the replica of this shape with the highest rate, or None if no setting fits and meets the limits."""
        pipeline = pipeline_of(self.costs, duty, shape)
        if not self.keeps_limits:
            pipeline = pipeline._replace(t_cap=pipeline.t_cap + np.inf, trip_cap=pipeline.trip_cap + np.inf)
        return template_of(duty, [TemplateStage(rank, 0) for rank in shape], pipeline)


def fastest(templates: Iterable[Template | None]) -> Template | None:
    """Return the template with the highest rate; of equal ones, the first."""
    return max((t for t in templates if t is not None), key=lambda template: template.rate, default=None)


def template_of(duty: ReplicaDuty, stages: Sequence[TemplateStage], pipeline: Pipeline) -> Template | None:
    """Return the stages, whose layers are still to be chosen, at the pipeline's best setting; None if there is none."""
    split = best_split(pipeline)
    if split.x < 0:
        return None
    chosen = tuple(replace(stage, layers=n) for stage, n in zip(stages, split.layers.tolist(), strict=True))
    return Template(duty.scope, duty.mixes[split.x], split.f, chosen, split.interval_s)


def tp_groups(count: int, sizes: Sequence[int]) -> Iterator[int]:
    """Yield the TP groups that ``count`` GPUs of a node form: as many of the largest size as fit, then of the next."""
    for size in sorted(sizes, reverse=True):
        while count >= size:
            yield size
            count -= size


# --- pipelines under the cost model


class Pipeline(NamedTuple):
    """S stages under X mixes and F numbers in flight, in the cost model.

    ``card_*`` are for attention workers that all stages share: the busiest card's seconds and the fullest card's share
    of memory per layer of each stage; zeros without them.
    """

    num_layers: int
    cut_floor: IntArray  # [num_layers + 1] the last allowed cut at or before each position
    layer_s: FloatArray  # [X, S] seconds of a request in one layer
    fixed_s: FloatArray  # [X, S] seconds of a stage whatever its layers
    chunk_layer_s: FloatArray  # [X, S] both for one iteration with a chunk; zeros except for unified mixes
    chunk_fixed_s: FloatArray  # [X, S]
    room: IntArray  # [X, F, S] layers that fit in memory
    card_s: FloatArray  # [X, S]
    card_share: FloatArray  # [X, F, S]
    prefix_layers: int  # layers of the first stage, not counted above; on the cards they are layers like any other
    in_flight: IntArray  # [F]
    t_cap: FloatArray  # [X, F] the longest interval that meets the latency limits
    trip_cap: FloatArray  # [X, F] the longest round trip with a chunk that meets them
    iterations: FloatArray  # [X]
    chunk_iterations: FloatArray  # [X]
    without_chunk: FloatArray  # [X, F] the probability that no micro-batch in flight carries a chunk
    full: Regime
    tight: Regime

    def unlimited_at(self, f: int) -> Pipeline:
        """Return the pipeline with one number in flight and without latency limits."""
        at, no_cap = slice(f, f + 1), np.full((len(self.t_cap), 1), np.inf)
        return self._replace(
            in_flight=self.in_flight[at], room=self.room[:, at].copy(), card_share=self.card_share[:, at].copy(),
            t_cap=no_cap, trip_cap=no_cap, without_chunk=self.without_chunk[:, at],
        )  # fmt: skip


def pipeline_of(costs: CostTables, duty: ReplicaDuty, ranks: Ranks) -> Pipeline:
    """Return times and room of a pipeline without attention workers under every mix of a duty."""
    t = costs.scopes[duty.scope].tables
    x, s = np.array(duty.mixes, dtype=np.int64), np.array(ranks, dtype=np.int64)
    groups = t.rank_groups[s]
    compute_s = t.layer_s[x[:, None], s] + t.own_s[x[:, None], s, groups]
    chunk_s = t.chunk.layer_s[x[:, None], s] + t.chunk.own_s[x[:, None], s, groups]
    return priced(costs, duty, ranks, compute_s, chunk_s, np.zeros(len(ranks), dtype=np.int64))


def priced(
    costs: CostTables, duty: ReplicaDuty, ranks: Ranks, compute_s: FloatArray, chunk_s: FloatArray, given: IntArray
) -> Pipeline:
    """Return a pipeline of layers with ``compute_s`` [X, S] per request and ``chunk_s`` [X, S] with a chunk.

    Its stages give away ``given`` [S] head groups per rank.
    """
    t = costs.scopes[duty.scope].tables
    x, s = np.array(duty.mixes, dtype=np.int64), np.array(ranks, dtype=np.int64)
    is_first, is_last = np.arange(len(s)) == 0, np.arange(len(s)) == len(s) - 1
    at = x[:, None], s
    layer_s = np.maximum(compute_s, t.wire_s[at])
    prefix_s = t.prefix_layers * np.maximum(compute_s + t.prefix_delta_s[at], t.wire_s[at])
    chunk_prefix_s = t.prefix_layers * (chunk_s + t.chunk.prefix_delta_s[at])
    f = np.arange(len(t.in_flight))
    (ranks_used, k), place = np.unique(np.stack([s, given]), axis=1, return_inverse=True)  # stages of a type are many
    kept = kept_bytes(t, x[:, None, None], f[:, None], ranks_used, k)
    fits = layers_on_rank(t, x[:, None, None], f[:, None], ranks_used, kept).astype(np.int64)
    room = fits[..., place.ravel(), stage_roles(len(s))]
    full, tight = costs.regimes(duty.role)
    return Pipeline(
        num_layers=t.num_layers,
        cut_floor=t.cut_floor,
        layer_s=layer_s,
        fixed_s=t.step_s[at] + np.where(is_first, prefix_s, t.hop_s[at]) + np.where(is_last, t.last_s[at], 0.0),
        chunk_layer_s=chunk_s,
        chunk_fixed_s=t.chunk.step_s[at]
        + np.where(is_first, chunk_prefix_s, t.chunk.hop_s[at])
        + np.where(is_last, t.chunk.last_s[at], 0.0),
        room=room,
        card_s=np.zeros_like(layer_s),
        card_share=np.zeros(room.shape),
        prefix_layers=t.prefix_layers,
        in_flight=t.in_flight,
        t_cap=t.t_cap[x],
        trip_cap=t.trip_cap[x],
        iterations=t.iterations[x],
        chunk_iterations=t.chunk_iterations[x],
        without_chunk=t.without_chunk[x],
        full=full,
        tight=tight,
    )


class LayerSplit(NamedTuple):
    """A split of layers; ``interval_s`` is infinite if none fits, and x and f index the pipeline's arrays."""

    interval_s: float
    x: int
    f: int
    layers: IntArray  # [S]


def best_split(p: Pipeline) -> LayerSplit:
    """Return the setting and the split of layers with the shortest interval between completions.

    In a full pipeline each layer goes to the stage that is quickest with it, which makes the slowest stage as quick as
    possible. With a single micro-batch, whose stages work in turn, it goes to the stage where it costs least. Settings
    are tried in the order of a lower bound on their intervals, from fractional layers.
    """
    num_stages = p.layer_s.shape[1]
    x, f = (index.ravel() for index in np.indices((len(p.layer_s), len(p.in_flight))))
    m, room = p.in_flight[f], p.room[x, f]
    lower_s = np.where(
        m == 1,
        p.num_layers * p.layer_s[x].min(axis=1) + p.fixed_s[x].sum(axis=1),
        (p.num_layers + (p.fixed_s / p.layer_s)[x].sum(axis=1)) / (1.0 / p.layer_s)[x].sum(axis=1),
    )  # fmt: skip
    lower_s *= 1.0 - ROUNDING
    may = ((m == 1) | (m >= num_stages)) & np.all(room >= 1, axis=1) & (room.sum(axis=1) >= p.num_layers)
    may &= (lower_s <= p.t_cap[x, f]) & (p.num_layers >= num_stages)
    order = np.flatnonzero(may)
    order = order[np.argsort(lower_s[order], kind="stable")]
    best, begin, at_once = LayerSplit(np.inf, -1, -1, np.zeros(num_stages, np.int64)), 0, FIRST_SETTINGS
    while begin < len(order) and lower_s[order[begin]] < best.interval_s:
        some = np.sort(order[begin : begin + at_once])
        begin, at_once = begin + at_once, 2 * at_once
        layers, fits = _with_cuts_moved(p, x[some], f[some], _filled(p, x[some], f[some]))
        interval_s = _intervals(p, x[some], f[some], layers)
        chunk_s = layers * p.chunk_layer_s[x[some]] + p.chunk_fixed_s[x[some]]
        trip_s = np.maximum(chunk_s.sum(axis=1), m[some] * chunk_s.max(axis=1))  # chunks follow each other
        fits &= (interval_s <= p.t_cap[x[some], f[some]]) & (trip_s <= p.trip_cap[x[some], f[some]])
        interval_s = np.where(fits, interval_s, np.inf)
        chosen = int(interval_s.argmin())
        if interval_s[chosen] < best.interval_s:
            at = some[chosen]
            best = LayerSplit(float(interval_s[chosen]), int(x[at]), int(f[at]), layers[chosen])
    return best


def _filled(p: Pipeline, x: IntArray, f: IntArray) -> IntArray:
    """Return the layers of every stage, at least one each, under settings in which they fit; [N, S]."""
    room, layer_s = p.room[x, f], p.layer_s[x]
    _, layers = split_layers(p.num_layers, layer_s, p.fixed_s[x], room, np.ones_like(room))
    sequential = p.in_flight[f] == 1
    order = np.argsort(layer_s, axis=1, kind="stable")
    roomy = np.take_along_axis(room, order, axis=1) - 1
    left = (p.num_layers - room.shape[1]) - (roomy.cumsum(axis=1) - roomy)
    in_turn = np.empty_like(room)
    np.put_along_axis(in_turn, order, 1 + np.clip(left, 0, roomy), axis=1)
    return np.where(sequential[:, None], in_turn, layers)


def _with_cuts_moved(p: Pipeline, x: IntArray, f: IntArray, layers: IntArray) -> tuple[IntArray, BoolArray]:
    """Return layers [N, S] with every forbidden cut moved to the last allowed one before it, and which are valid."""
    ends = layers.cumsum(axis=1)
    ends[:, :-1] = p.cut_floor[ends[:, :-1]]
    layers = np.diff(ends, axis=1, prepend=0)
    shares = p.card_share[x, f]
    share = p.prefix_layers * shares[:, 0] + (layers * shares).sum(axis=1)
    return layers, np.all((layers >= 1) & (layers <= p.room[x, f]), axis=1) & (share <= 1.0 + ROUNDING)


def _intervals(p: Pipeline, x: IntArray, f: IntArray, layers: IntArray) -> FloatArray:
    """Return the seconds between completions; [N]."""
    m = p.in_flight[f]
    is_full = m >= 2 * layers.shape[1]
    least = np.where(m == 1, 0.0, np.where(is_full, p.full.least, p.tight.least))
    unevenness = np.where(m == 1, 0.0, np.where(is_full, p.full.unevenness, p.tight.unevenness))
    iterations = Iterations(p.iterations[x, None], p.chunk_iterations[x, None], p.without_chunk[x, f][:, None])
    more = slack(iterations, p.layer_s[x], p.chunk_layer_s[x], least[:, None], unevenness[:, None])
    seconds = (1.0 + more) * (layers * p.layer_s[x] + p.fixed_s[x])
    card_s = p.prefix_layers * p.card_s[x, 0] + (layers * p.card_s[x]).sum(axis=1)
    busiest = np.maximum(seconds.max(axis=1), (1.0 + least) * card_s)
    return np.asarray(np.maximum(busiest, seconds.sum(axis=1) / m))
