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
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.cluster import Cluster
from hetis.solver.compiled import kernel_of
from hetis.solver.cost import Regime
from hetis.solver.placement import compiled as placement
from hetis.solver.placement.fleet import DeviceClass, IntArray, class_of_slots
from hetis.solver.placement.stage_cost import Iterations, kept_bytes, layers_on_rank, stretch
from hetis.solver.placement.tables import CostTables, FloatArray, Tables
from hetis.solver.placement.template import Template, TemplateStage, roles
from hetis.solver.plan import Role

MAX_ORDERED_TYPES = 3  # number of types of a group up to which every order is tried

Part = tuple[int, ...]  # GPUs, or other vertices of a graph, ascending
Ranks = tuple[int, ...]  # rank type (index into `CostTables.ranks`) of every stage in order
# The composition of a group: for every device class, the number of GPUs on each of its nodes, most first.
Composition = tuple[tuple[int, tuple[int, ...]], ...]

kernel = kernel_of(Path(__file__).parent, Path(placement.__file__).parent)


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
        shapes = list(self.shapes(group))
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
        return template_of(duty, [TemplateStage(rank, 1, 0) for rank in shape], pipeline)


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
            t_cap=no_cap, trip_cap=no_cap, without_chunk=self.without_chunk[:, at].copy(),
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
    room = np.empty((len(x), len(t.in_flight), len(s)), dtype=np.int64)
    _fill_rooms(t, x, s, np.array(roles(len(ranks)), dtype=np.int64), given, room)
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


@kernel
def _fill_rooms(t: Tables, x: IntArray, s: IntArray, places: IntArray, given: IntArray, room: IntArray) -> None:
    """Fill the layers that fit on a rank of every stage, for every mix and number in flight."""
    for i in range(x.shape[0]):
        for f in range(t.in_flight.shape[0]):
            for j in range(s.shape[0]):
                kept = kept_bytes(t, x[i], f, s[j], 1, given[j])
                room[i, f, j] = int(layers_on_rank(t, x[i], f, s[j], kept, places[j]))


class LayerSplit(NamedTuple):
    """A split of layers; ``interval_s`` is infinite if none fits, and x and f index the pipeline's arrays."""

    interval_s: float
    x: int
    f: int
    layers: IntArray  # [S]


@kernel
def best_split(p: Pipeline) -> LayerSplit:
    """Return the setting and the split of layers with the shortest interval between completions.

    In a full pipeline each layer goes to the stage that is quickest with it, which makes the slowest stage as quick as
    possible. With a single micro-batch, whose stages work in turn, it goes to the stage where it costs least.
    """
    num_mixes, num_stages = p.layer_s.shape
    best = LayerSplit(np.inf, -1, -1, np.zeros(num_stages, np.int64))
    for x in range(num_mixes):
        for f in range(p.in_flight.shape[0]):
            m = p.in_flight[f]
            if 1 < m < num_stages:
                continue
            layers = _filled(p, x, f)
            if layers.shape[0] == 0 or not _move_cuts(p, x, f, layers):
                continue
            interval, trip = _interval(p, x, f, layers), 0.0
            for s in range(num_stages):
                trip += layers[s] * p.chunk_layer_s[x, s] + p.chunk_fixed_s[x, s]
            if interval <= p.t_cap[x, f] and interval < best.interval_s and trip <= p.trip_cap[x, f]:
                best = LayerSplit(interval, x, f, layers)
    return best


@kernel
def _filled(p: Pipeline, x: int, f: int) -> IntArray:
    """Return the layers of every stage, at least one each, or an empty array if they do not fit."""
    num_stages = p.layer_s.shape[1]
    layers = np.ones(num_stages, np.int64)
    left, total = p.num_layers - num_stages, 0
    for s in range(num_stages):
        if p.room[x, f, s] < 1:
            return np.empty(0, np.int64)
        total += p.room[x, f, s]
    if left < 0 or total < p.num_layers:
        return np.empty(0, np.int64)
    sequential = p.in_flight[f] == 1
    for _ in range(left):
        chosen, least = -1, np.inf
        for s in range(num_stages):
            if layers[s] < p.room[x, f, s]:
                late = p.layer_s[x, s] if sequential else p.fixed_s[x, s] + (layers[s] + 1) * p.layer_s[x, s]
                if late < least:
                    chosen, least = s, late
        layers[chosen] += 1
    return layers


@kernel
def _move_cuts(p: Pipeline, x: int, f: int, layers: IntArray) -> bool:
    """Move every forbidden cut to the last allowed one before it; return whether that leaves a valid split."""
    start, held = 0, 0
    for s in range(layers.shape[0]):
        held += layers[s]
        end = held if s == layers.shape[0] - 1 else p.cut_floor[held]
        layers[s] = end - start
        start = end
        if layers[s] < 1 or layers[s] > p.room[x, f, s]:
            return False
    share = p.prefix_layers * p.card_share[x, f, 0]
    for s in range(layers.shape[0]):
        share += layers[s] * p.card_share[x, f, s]
    fits: bool = share <= 1.0 + 1e-9
    return fits


@kernel
def _interval(p: Pipeline, x: int, f: int, layers: IntArray) -> float:
    """Return the seconds between completions."""
    m = p.in_flight[f]
    regime = p.full if m >= 2 * layers.shape[0] else p.tight
    least = 0.0 if m == 1 else regime.least
    n = Iterations(p.iterations[x], p.chunk_iterations[x], p.without_chunk[x, f])
    busiest, total, card = 0.0, 0.0, p.prefix_layers * p.card_s[x, 0]
    for s in range(layers.shape[0]):
        longer = 1.0
        if m > 1:
            longer = stretch(n, p.layer_s[x, s], p.chunk_layer_s[x, s], regime.least, regime.unevenness)
        seconds = longer * (layers[s] * p.layer_s[x, s] + p.fixed_s[x, s])
        busiest = max(busiest, seconds)
        total += seconds
        card += layers[s] * p.card_s[x, s]
    interval: float = max(max(busiest, (1.0 + least) * card), total / m)
    return interval
