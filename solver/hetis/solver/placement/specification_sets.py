"""Sets and data of the specification: everything its variables choose from, as numbers, with the same letters.

Times and bytes are the checker's (`hetis.solver.check`). Choices that do not fit in memory, or are too slow for the
latency limits on their own, are never listed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hetis.solver.check.fleet import PoolShape, StageShape, slowest
from hetis.solver.check.memory import kv_block_tokens, kv_tokens_of_a_copy, rank_bytes, worker_bytes
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.setting import Setting, divides, head_groups_per_rank
from hetis.solver.check.timing import chunk_seconds, layer_seconds, slack, stage_seconds, tpot_per_t, ttft_round_trips
from hetis.solver.cost import UNEVENNESS_STEP, unevenness_level
from hetis.solver.placement.classes import DeviceClass, device_classes
from hetis.solver.problem import PlacementProblem

Groups = tuple[tuple[int, int], ...]  # (g, n) of every TP group; each pool card is a group of one


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """e: what all stages of a replica share, including GPU type and layers if the family does not mix them."""

    setting: Setting
    zones: frozenset[str]
    num_copies: int  # K, as the slack depends on it
    most_copies: float  # K
    t_limit_s: float  # T
    chunk_limit_s: float  # longest iteration of a stage with a chunk, divided by its copies
    unevenness: float  # limit on that iteration as a multiple of a mean one
    gpu: str | None  # None: any
    layers: tuple[int, int]  # fewest and most of a stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """q: a stage of a setting, or the empty stage (``shape`` is None)."""

    shared: int  # e
    shape: StageShape | None
    groups: Groups
    is_whole: bool  # holds the whole model
    u_s: float  # including slack
    rate_limit: float  # w

    @property
    def layers(self) -> int:
        """l"""
        return self.shape.layers if self.shape else 0

    @property
    def copies(self) -> int:
        """c"""
        return self.shape.copies if self.shape else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """The sets over which a problem's MILP ranges."""

    classes: tuple[DeviceClass, ...]  # g
    shared: tuple[Shared, ...]  # e
    slots: tuple[tuple[Choice, ...], ...]  # q of every stage slot s

    @staticmethod
    def of(problem: PlacementProblem, num_stages: int) -> Sets:
        """Return the sets for replicas of at most ``num_stages`` stages."""
        classes = device_classes(problem.cluster)
        shared = tuple(_shared(problem))
        listed = _Choices(problem, classes, shared, tuple(_stage_types(problem, classes)))
        first = tuple(listed.of_slot(is_first=True, is_last=True))
        if num_stages == 1:
            return Sets(classes=classes, shared=shared, slots=(first,))
        first += tuple(listed.of_slot(is_first=True, is_last=False))
        empty = tuple(_empty_stages(shared, first))
        middle = (*listed.of_slot(is_first=False, is_last=False), *empty) if num_stages > 2 else ()
        last = (*listed.of_slot(is_first=False, is_last=True), *empty)
        return Sets(classes=classes, shared=shared, slots=(first, *[middle] * (num_stages - 2), last))


def _shared(problem: PlacementProblem) -> Iterator[Shared]:
    """Yield e: every combination of what the stages of a replica share."""
    family, cluster, rederivation = problem.family, problem.cluster, Rederivation(problem)
    repeated = problem.model.num_layers - problem.model.prefix_layers
    zone_sets = [
        frozenset(zones)
        for size in range(1, len(cluster.zones()) + 1)
        for zones in itertools.combinations(cluster.zones(), size)
    ]
    types = [None] if family.mixed_types else list(dict.fromkeys(s.gpu for g in cluster.node_groups for s in g.gpus))
    # Stages that differ by at most one layer have some number of layers or one more.
    layers = [(1, repeated)] if family.uneven_layers else [(few, few + 1) for few in range(1, repeated + 1)]
    for b, M, C in itertools.product(family.micro_batches, family.in_flight, family.chunk_tokens):
        if not family.engine_settings.allows(micro_batch=b, in_flight=M):
            continue
        setting = rederivation.setting(micro_batch=b, in_flight=M, chunk_tokens=C)
        chunk_rules = _chunk_rules(setting)
        for (num_copies, most_copies), (per_copy_s, unevenness, t_limit_s), zones, gpu, held in itertools.product(
            _fillings(setting), chunk_rules, zone_sets, types, layers
        ):
            yield Shared(
                setting=setting,
                zones=zones,
                num_copies=num_copies,
                most_copies=most_copies,
                t_limit_s=t_limit_s,
                chunk_limit_s=per_copy_s / (most_copies // 1) if M > 1 else math.inf,
                unevenness=unevenness,
                gpu=gpu,
                layers=held,
            )


def _fillings(setting: Setting) -> list[tuple[int, float]]:
    """Return (K on which slack depends, the most stage copies that a replica with that slack may have)."""
    M = setting.in_flight
    return [(1, math.inf)] if M == 1 else [(1, M / 2), (M, M)]


def _t_limit_s(setting: Setting) -> float:
    """Return T: the latency limits as a limit on the seconds between completions."""
    objective, limit = setting.problem.objective, math.inf
    if objective.tpot_limit_s is not None:
        limit = objective.tpot_limit_s / tpot_per_t(setting)
    return min(limit, _trip_limit_s(setting) * setting.iterations / setting.in_flight)


def _trip_limit_s(setting: Setting) -> float:
    """Return the limit on TTFT as a limit on a round trip with a chunk."""
    limit_s = setting.problem.objective.ttft_limit_s
    return math.inf if limit_s is None else limit_s / ttft_round_trips(setting)


def _chunk_rules(setting: Setting) -> list[tuple[float, float, float]]:
    """Return alternatives of (limit on an iteration with a chunk before copies, limit on its unevenness, T)."""
    trip_s, t_limit_s = _trip_limit_s(setting), _t_limit_s(setting)
    if math.isinf(trip_s) or setting.in_flight > 1:
        return [(trip_s, math.inf, t_limit_s)]
    levels = range(1 + unevenness_level(setting.iterations / setting.chunk_iterations))
    limits = [UNEVENNESS_STEP**k for k in levels]
    return [(math.inf, limit, min(t_limit_s, trip_s * setting.iterations / limit)) for limit in limits]


def _stage_types(problem: PlacementProblem, classes: Sequence[DeviceClass]) -> Iterator[tuple[StageShape, Groups]]:
    """Yield every (class, n, c, pool class, p, k) with the TP groups it takes; layers and hop link are still open."""
    family, model = problem.family, problem.model
    for (g, own), n, c in itertools.product(enumerate(classes), family.tp_sizes, range(1, family.max_copies + 1)):
        if n > own.gpus_per_node or n * c > own.available or not divides(model, n):
            continue
        shape = StageShape(gpu=own.gpu, tp=n, copies=c, layers=1, intra_link=own.intra, hop_link=own.nic)
        yield shape, ((g, n),) * c
        for (i, other), p in itertools.product(enumerate(classes), family.pool_sizes(c)):
            if not model.heads_can_move or other.zone != own.zone or n > model.head_groups or p * c > other.available:
                continue
            link = slowest([own.nic, other.nic, problem.cluster.network.zone_link(own.zone, own.zone)])
            for k in range(1, head_groups_per_rank(model, n) + 1):
                pool = PoolShape(gpu=other.gpu, cards=p, head_groups=k, link=link)
                yield replace(shape, pool=pool), ((g, n),) * c + ((i, 1),) * (p * c)


@dataclass(frozen=True, slots=True)
class _Choices:
    """The choices q of the slots."""

    problem: PlacementProblem
    classes: tuple[DeviceClass, ...]
    shared: tuple[Shared, ...]
    stage_types: tuple[tuple[StageShape, Groups], ...]

    def of_slot(self, *, is_first: bool, is_last: bool) -> Iterator[Choice]:
        """Yield every stage that fits in memory and is not too slow on its own."""
        network = self.problem.cluster.network
        repeated = self.problem.model.num_layers - self.problem.model.prefix_layers
        for e, shared in enumerate(self.shared):
            zone_links = [network.zone_link(a, b) for a in shared.zones for b in shared.zones]
            for shape, groups in self.stage_types:
                own = self.classes[groups[0][0]]
                if own.zone not in shared.zones or not _is_one_type(shape, shared.gpu):
                    continue
                one_layer = replace(shape, hop_link=slowest([own.nic, *zone_links]))
                layer_s = layer_seconds(shared.setting, one_layer)
                one_layer_s = stage_seconds(shared.setting, one_layer, is_first=is_first, is_last=is_last)
                fewest, most = (repeated, repeated) if is_first and is_last else (1, repeated - 1)
                for held in range(max(fewest, shared.layers[0]), min(most, shared.layers[1]) + 1):
                    stage = replace(one_layer, layers=held)
                    if not _fits_memory(shared.setting, stage, is_first=is_first, is_last=is_last):
                        break
                    u = one_layer_s + (held - 1) * layer_s
                    stretched_s = (1 + slack(shared.setting, stage, shared.num_copies)) * u
                    w = stage.copies / stretched_s
                    chunk_s = chunk_seconds(shared.setting, stage, is_first=is_first, is_last=is_last)
                    if (
                        w * shared.t_limit_s >= 1 - 1e-9
                        and stage.copies <= shared.most_copies
                        and chunk_s <= stage.copies * shared.chunk_limit_s * (1 + 1e-9)
                        and chunk_s * shared.setting.iterations <= u * shared.unevenness * (1 + 1e-9)
                    ):
                        whole = is_first and is_last
                        yield Choice(
                            shared=e, shape=stage, groups=groups, is_whole=whole, u_s=stretched_s, rate_limit=w
                        )


def _empty_stages(shared: Sequence[Shared], first: Sequence[Choice]) -> Iterator[Choice]:
    """Yield the empty stage of every setting, which passes any rate that a first stage can reach."""
    for e in range(len(shared)):
        w = max((q.rate_limit for q in first if q.shared == e), default=0.0)
        yield Choice(shared=e, shape=None, groups=(), is_whole=False, u_s=0.0, rate_limit=w)


def _is_one_type(shape: StageShape, gpu: str | None) -> bool:
    types = {shape.gpu, shape.pool.gpu if shape.pool else shape.gpu}
    return gpu is None or types == {gpu}


def _fits_memory(setting: Setting, stage: StageShape, *, is_first: bool, is_last: bool) -> bool:
    profiles = setting.problem.profiles
    if rank_bytes(setting, stage, is_first=is_first, is_last=is_last) > profiles[stage.gpu].usable_bytes:
        return False
    if kv_tokens_of_a_copy(setting, stage.copies) > kv_block_tokens(setting):
        return False
    pool = stage.pool
    return pool is None or worker_bytes(setting, stage, pool, is_first=is_first) <= profiles[pool.gpu].usable_bytes
