"""The best single replica for every share of a tiny fleet by brute force; see `oracle.py`.

Every role, every sequence of stages that a zone could hold, every split of the layers, every (b, M, C).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from hetis.solver.check import memory, timing
from hetis.solver.check.replica_shapes import PoolShape, StageShape, slowest
from hetis.solver.check.setting import Setting, divides, head_groups_per_rank
from hetis.solver.cluster import Link
from hetis.solver.engine_rules import EngineRules
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem
from tests.solver.device_classes import DeviceClass, device_classes, explicit_links
from tests.solver.node_fits import Need, combine, fits_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOption:
    """A stage without its layers. ``groups`` are the sizes of the device groups it takes of each class."""

    device_class: DeviceClass
    shape: StageShape  # layers and hop link to be filled in
    groups: tuple[tuple[DeviceClass, int], ...]  # (class, GPUs that must share a node), pool cards one by one
    sharing: int = 1  # copies that share their experts


Precision = tuple[str, float, float]  # name of the weights' precision, bytes of a weight, bytes of an element of KV


Build = tuple[Precision, str]  # a precision and the vendor


def builds_of(problem: PlacementProblem) -> dict[Build, set[str]]:
    """Return the GPU types of the fleet by the precision in which they compute layers, and by vendor."""
    model = problem.model
    own = {one.gpu: (one.weights, one.weight_bytes, one.kv_bytes) for one in model.precisions}
    found: dict[Build, set[str]] = {}
    for device_class in device_classes(problem.cluster):
        usual = (model.weights, model.weight_bytes, model.kv_bytes)
        vendor = problem.cluster.gpu_types[device_class.gpu].vendor
        found.setdefault((own.get(device_class.gpu, usual), vendor), set()).add(device_class.gpu)
    return found


def kv_of(problem: PlacementProblem, build: Build) -> Build:
    """Return the build, with one name for all vendors between which its KV may go."""
    (_, _, kv_bytes), vendor = build
    engine, model = problem.family.engine, problem.model
    states = sum(mixer.state_bytes(kv_bytes) for mixer, _ in model.mixers)
    names = {mixer.kernel.value for mixer, _ in model.mixers} | ({"sparse"} if model.indexer else set())
    goes = engine is not None and vendor in engine.kv_vendors and kv_bytes == 2 and not states
    return (build[0], "any") if goes and names in ({"grouped"}, {"latent"}) else build


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A replica's role, its build, its zone and those to which its KV may go, and its share of the fleet.

    Of nodes with explicit links it exchanges KV with those in ``exchange``, where all of its own are.
    """

    role: Role
    build: Build
    zone: str
    kv_zones: tuple[str, ...]
    gpus: frozenset[str]
    need: Need
    exchange: tuple[str, ...] = ()


def best_replica_of_need(
    problem: PlacementProblem, nodes: Mapping[DeviceClass, int], may_be: Callable[[StageOption], bool]
) -> dict[Wanted, float]:
    """Return the rate of the best single replica for each role and share of the fleet."""
    found = dict[Wanted, float]()
    for build, gpus in builds_of(problem).items():
        (weights, weight_bytes, kv_bytes), _ = build
        model = replace(problem.model, weights=weights, weight_bytes=weight_bytes, kv_bytes=kv_bytes, precisions=())
        in_it = replace(problem, model=model)
        options = [option for option in stage_options(in_it, nodes) if option.device_class.gpu in gpus]
        if kv_bytes != 2:
            options = [option for option in options if option.shape.pool is None]
        found |= best_replica_of_build(in_it, build, nodes, [option for option in options if may_be(option)])
    return found


def best_replica_of_build(
    problem: PlacementProblem, build: Build, nodes: Mapping[DeviceClass, int], options: list[StageOption]
) -> dict[Wanted, float]:
    """The same for replicas of these stages, which have the problem's model in one precision."""
    rates = dict[Wanted, float]()
    zones = sorted({device_class.zone for device_class in nodes})
    of_nodes = [(), *subsets({device_class.node for device_class in nodes if device_class.node})]
    for role, b, M, C, d in iterations(problem):
        setting = setting_of(problem, role=role, b=b, M=M, C=C, d=d)
        of_kind = [option for option in options if option.sharing == d]
        groups = [of_kind] if d > 1 else alike_for_engine(problem, of_kind, role, M)
        for zone, some, of_group in itertools.product(zones, of_nodes, groups):
            alike = [option for option in of_group if {c.node for c, _ in option.groups} <= {"", *some}]
            for kv_zones, exchange in exchanges(problem, role, zone):
                if not set(some) <= set(exchange) and role is not Role.UNIFIED:
                    continue
                around = [option for option in of_group if {c.node for c, _ in option.groups} <= {"", *exchange}]
                search = ReplicaSearch(problem, setting, nodes, alike, zone, some, kv_zones, exchange, around)
                for need, rate in search.all_replicas():
                    gpus = frozenset(c.gpu for c, sizes in zip(nodes, need, strict=True) if sizes)
                    wanted = Wanted(
                        role=role, build=build, zone=zone, kv_zones=kv_zones, gpus=gpus, need=need, exchange=exchange
                    )  # fmt: skip
                    rates[wanted] = max(rates.get(wanted, rate), rate)
    return rates


def exchanges(problem: PlacementProblem, role: Role, zone: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Yield where a replica's KV may go: the zones, and the nodes with explicit links.

    Those are all of them, or a set inside a zone in which nobody pays for a link to the rest, or would pay for another
    link if the set were larger.
    """
    if role is Role.UNIFIED:
        yield (), ()
        return
    classes, zones = list(device_classes(problem.cluster)), tuple(sorted(problem.cluster.zones()))
    everyone = tuple(sorted({c.node for c in classes if c.node}))
    for kv_zones in {(zone,), zones} if role is Role.PREFILL else {()}:
        yield kv_zones, everyone

    def pays(node: str, inside: Iterable[str]) -> tuple[Link, ...]:
        own = [c.nic for c in classes if c.node == node] + [problem.cluster.network.zone_link(zone, zone)]
        explicit = explicit_links(problem, next(c for c in classes if c.node == node), inside)
        return tuple(slowest([link, own[-1], *explicit]) for link in own)

    here = sorted({c.node for c in classes if c.node and c.zone == zone})
    for size in range(len(here) + 1):
        for inside in itertools.combinations(here, size):
            larger = ((*inside, node) for node in here if node not in inside)
            grows = any(all(pays(n, inside) == pays(n, more) for n in inside) for more in larger)
            if inside != everyone and not grows:
                yield (zone,) if role is Role.PREFILL else (), inside


def may_have_pool(problem: PlacementProblem, role: Role, stage: StageShape) -> bool:
    """Return whether a stage of this role may have its attention workers, or have none."""
    if role is Role.PREFILL:
        return stage.pool is None
    return True


def alike_for_engine(
    problem: PlacementProblem, options: list[StageOption], role: Role, M: int
) -> Iterator[list[StageOption]]:
    """Stages that an engine may have in one replica: of one TP size, with the same workers or none."""
    engine = rules_of(problem)
    if (role is Role.DECODE or engine.keeps_indexers_together(problem.model)) and M > 1:
        return  # KV is handed over only to single stages
    if role is Role.PREFILL and M > 1 and problem.model.sliding_window and engine.name.startswith("vllm"):
        return
    kinds: dict[object, list[StageOption]] = {}
    for option in options:
        pool = option.shape.pool
        beside = None if pool is None else (option.groups[-1][0], pool.cards, pool.head_groups)
        if pool is None or (role is Role.UNIFIED and engine.max_pooled_stages >= M):
            kinds.setdefault((option.shape.tp, beside), []).append(option)
    yield from kinds.values()


def rules_of(problem: PlacementProblem) -> EngineRules:
    assert problem.family.engine is not None, "every search is for an engine"
    return problem.family.engine


def setting_of(problem: PlacementProblem, *, role: Role, b: int, M: int, C: int, d: int = 1) -> Setting:
    workload = problem.workload.clipped_to(problem.model.max_position)
    moments = workload.moments(block_tokens=problem.assumptions.block_tokens)
    return Setting(
        problem=problem, moments=moments, micro_batch=b, in_flight=M, chunk_tokens=C, role=role, attention_dp=d
    )


def fits_memory(setting: Setting, stage: StageShape, *, is_first: bool, is_last: bool) -> bool:
    """Return whether a stage's weights, activations and KV fit on its ranks and its attention workers."""
    profiles = setting.problem.profiles
    if memory.rank_bytes(setting, stage, is_first=is_first, is_last=is_last) > profiles[stage.gpu].usable_bytes:
        return False
    if memory.kv_tokens_of_a_copy(setting, stage.copies) > memory.kv_block_tokens(setting):
        return False
    if stage.pool is None:
        return True
    num_bytes = memory.worker_bytes(setting, stage, stage.pool, is_first=is_first)
    return num_bytes <= profiles[stage.pool.gpu].usable_bytes


def iterations(problem: PlacementProblem) -> Iterator[tuple[Role, int, int, int, int]]:
    """Every (role, b, M, C, d) of the family; d copies that share their experts have an iteration in flight each."""
    family = problem.family
    for role in family.roles:
        batches = (0,) if role is Role.PREFILL else family.micro_batches
        chunks = (0,) if role is Role.DECODE else family.chunk_tokens
        most = family.engine_settings.max_num_seqs
        for b, M, C in itertools.product(batches, family.in_flight, chunks):
            if most is None or M * max(b, 1) <= most:
                yield role, b, M, C, 1
                yield from ((role, b, d, C, d) for d in family.attention_dp_of(problem.model) if M == 1)


def stage_options(problem: PlacementProblem, nodes: Mapping[DeviceClass, int]) -> Iterator[StageOption]:
    family, model = problem.family, problem.model
    for own in nodes:
        for n in family.tp_sizes:
            if n > own.per_node or not divides(model, n):
                continue
            shape = StageShape(gpu=own.gpu, tp=n, copies=1, layers=1, intra_link=own.intra_link, hop_link=own.nic)
            yield StageOption(device_class=own, shape=shape, groups=((own, n),))
            for d in family.attention_dp_of(model):
                if (
                    n * d in family.tp_sizes
                    and n * d <= own.per_node
                    and model.experts
                    and model.experts.count % (n * d) == 0
                ):
                    shared = ((own, n * d),)
                    yield StageOption(
                        device_class=own, shape=replace(shape, copies=d), groups=shared, sharing=d
                    )  # fmt: skip
            for other, p in itertools.product(nodes, range(1, family.max_pool + 1)):
                if (
                    not model.heads_can_move
                    or other.zone != own.zone
                    or n > model.head_groups
                    or p > other.per_node * nodes[other]
                ):
                    continue
                inside = problem.cluster.network.zone_link(own.zone, own.zone)
                link = slowest([own.nic, other.nic, inside, *explicit_links(problem, own, [other.node])])
                for k in range(1, head_groups_per_rank(model, n) + 1):
                    pool = PoolShape(gpu=other.gpu, cards=p, head_groups=k, link=link)
                    taken = ((own, n), *[(other, 1)] * p)
                    yield StageOption(device_class=own, shape=replace(shape, pool=pool), groups=taken)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """The first stages of a replica: everything on which their continuation depends, except times."""

    layers: int  # number of repeated layers that they hold together
    need: Need
    stages: int
    fewest: int  # fewest layers of a stage; 0 if the family does not care
    most: int


# Times of the first stages: of the slowest, of all together, and the longest iteration with a chunk.
Times = tuple[float, float, float]


class ReplicaSearch:
    """All replicas of one (b, M, C) in a zone: pipelines of M stages, or one stage whose copies share their experts.

    Of nodes with explicit links they use only ``linked``, and pay for the links among these. For KV that is handed
    over they pay for those to all of ``exchange``, where replicas may have the stages ``around``.

    Of two beginnings that are equal except for their times, the one that is slower in all of them is dropped: whatever
    follows, it stays slower.
    """

    def __init__(
        self,
        problem: PlacementProblem,
        setting: Setting,
        nodes: Mapping[DeviceClass, int],
        options: list[StageOption],
        zone: str,
        linked: tuple[str, ...],
        kv_zones: tuple[str, ...],
        exchange: tuple[str, ...],
        around: list[StageOption],
    ) -> None:
        network = problem.cluster.network
        inside, kv_links = network.zone_link(zone, zone), [network.zone_link(zone, other) for other in kv_zones]
        self.problem, self.setting, self.nodes, self.engine = problem, setting, nodes, rules_of(problem)
        self.num_stages = 1 if setting.attention_dp > 1 else setting.in_flight
        self.layers = problem.model.num_layers - problem.model.prefix_layers  # repeated layers
        self.options, kept = [], []
        for option in dict.fromkeys([*options, *around]):
            if option.device_class.zone == zone and may_have_pool(problem, setting.role, option.shape):
                own = option.device_class
                hop_link = slowest([own.nic, inside, *explicit_links(problem, own, linked)])
                kv_link = slowest([own.nic, inside, *kv_links, *explicit_links(problem, own, exchange)])
                shape = replace(option.shape, hop_link=hop_link, kv_link=kv_link, arrival_link=kv_link)
                kept.append(shape)
                if option in options:
                    self.options.append(replace(option, shape=shape))
        # Over all ranks in the zone, whichever a replica uses: the part of the TTFT limit reserved for the last KV.
        sends = setting.role is Role.PREFILL
        landings = (timing.landing_seconds(setting, s, s.kv_link) for s in kept if s.kv_link and sends)
        self.landing_s = max(landings, default=0.0)
        self.seconds: dict[tuple[int, int, bool, bool], tuple[float, float] | None] = {}
        self.possible: dict[Need, list[tuple[int, Need]]] = {}

    def all_replicas(self) -> Iterator[tuple[Need, float]]:
        """Yield the rate of every replica."""
        nothing = Begun(layers=0, need=((),) * len(self.nodes), stages=0, fewest=0, most=0)
        begun: list[dict[Begun, list[Times]]] = [{} for _ in range(self.layers + 1)]
        begun[0][nothing] = [(0.0, 0.0, 0.0)]
        for done in range(self.layers):
            for beginning, all_times in begun[done].items():
                for times in all_times:
                    for longer, longer_times in self.extend(beginning, times):
                        keep_fastest(begun[longer.layers].setdefault(longer, []), longer_times)
        for replica, all_times in begun[self.layers].items():
            for times in all_times:
                yield from self.finish(replica, times)

    def extend(self, begun: Begun, times: Times) -> Iterator[tuple[Begun, Times]]:
        """Yield every stage that may follow."""
        model, is_last = self.problem.model, begun.stages + 1 == self.num_stages
        if begun.stages == self.num_stages:
            return
        for number, need in self.options_after(begun.need):
            for held in range(self.least_layers(begun), self.layers - begun.layers + 1):
                done = begun.layers + held
                if (done == self.layers) != is_last:
                    continue
                stage_s = self.stage_s(number, held, begun.layers == 0, is_last)
                fewest, most = self.extremes(begun, held)
                if stage_s is None or most > fewest + 1 or not model.allowed_cut(model.prefix_layers + done):
                    continue
                longer = Begun(layers=done, need=need, stages=begun.stages + 1, fewest=fewest, most=most)
                u, chunk_s = stage_s
                yield longer, (max(times[0], u), times[1] + u, max(times[2], chunk_s))

    def least_layers(self, begun: Begun) -> int:
        """Return the fewest repeated layers of the next stage; the first one also has the leading dense layers."""
        return max(1, self.engine.min_layers - (0 if begun.layers else self.problem.model.prefix_layers))

    def extremes(self, begun: Begun, held: int) -> tuple[int, int]:
        """Return the fewest and most layers of a stage so far, in families with even layers."""
        if self.problem.family.uneven_layers:
            return 0, 0
        return min(begun.fewest or held, held), max(begun.most, held)

    def options_after(self, need: Need) -> list[tuple[int, Need]]:
        """Return the stages for which devices are left (of one type if the family requires it), and all needs then."""
        if need not in self.possible:
            after = [(i, combine(need, self.need_of(option))) for i, option in enumerate(self.options)]
            self.possible[need] = [
                (i, total) for i, total in after if fits_nodes(total, self.nodes) and self.is_in_family(total)
            ]
        return self.possible[need]

    def is_in_family(self, need: Need) -> bool:
        types = {device_class.gpu for device_class, sizes in zip(self.nodes, need, strict=True) if sizes}
        return len(types) == 1 or self.problem.family.mixed_types

    def finish(self, replica: Begun, times: Times) -> Iterator[tuple[Need, float]]:
        """Yield the replica's rate if it meets the limits."""
        slowest_s, total_s, chunk_s = times
        if sum(map(sum, replica.need)) > (self.engine.max_gpus or math.inf):
            return
        shared = self.setting.attention_dp  # copies that share their experts serve in turn
        t_s = max(slowest_s / shared, total_s / self.setting.in_flight)
        if t_s <= t_limit_s(self.setting, self.landing_s) and self.keeps_chunk_rule(chunk_s / shared):
            yield replica.need, 1 / t_s

    def keeps_chunk_rule(self, chunk_s: float) -> bool:
        """Return whether stages keep the family's rule by which a unified replica meets its TTFT limit."""
        setting, limit_s = self.setting, self.problem.objective.ttft_limit_s
        if limit_s is None or setting.role is not Role.UNIFIED:
            return True
        return chunk_s * setting.in_flight <= limit_s / ttft_round_trips(setting) * (1 + 1e-9)

    def stage_s(self, number: int, layers: int, is_first: bool, is_last: bool) -> tuple[float, float] | None:
        """Return u of a stage with its slack, and its iteration with a chunk; None if it does not fit in memory."""
        key = (number, layers, is_first, is_last)
        if key not in self.seconds:
            stage = replace(self.options[number].shape, layers=layers)
            ends = {"is_first": is_first, "is_last": is_last}
            self.seconds[key] = None
            if fits_memory(self.setting, stage, **ends):
                slack = timing.slack(self.setting, stage, self.setting.in_flight)
                u = (1 + slack) * timing.stage_seconds(self.setting, stage, **ends)
                self.seconds[key] = (u, timing.chunk_seconds(self.setting, stage, **ends))
        return self.seconds[key]

    def need_of(self, option: StageOption) -> Need:
        taken: dict[DeviceClass, list[int]] = {device_class: [] for device_class in self.nodes}
        for device_class, size in option.groups:
            taken[device_class].append(size)
        return tuple(tuple(sorted(sizes, reverse=True)) for sizes in taken.values())


def keep_fastest(kept: list[Times], new: Times) -> None:
    """Add times unless others are no slower in all of them, and drop those that are no faster in any."""
    if not any(no_slower(old, new) for old in kept):
        kept[:] = [old for old in kept if not no_slower(new, old)] + [new]


def no_slower(one: Times, other: Times) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def ttft_round_trips(setting: Setting) -> float:
    """Return p95 TTFT in round trips with a chunk, if every iteration in flight takes an equal share of one."""
    return 1 + timing.chunks_ahead(setting) * setting.attention_dp / setting.in_flight


def t_limit_s(setting: Setting, landing_s: float) -> float:
    """Return the latency limits as a limit on t."""
    objective, limit = setting.problem.objective, math.inf
    if objective.tpot_limit_s is not None and setting.role is not Role.PREFILL:
        limit = objective.tpot_limit_s / timing.tpot_per_t(setting)
    if objective.ttft_limit_s is not None and setting.role is not Role.DECODE:
        round_trip_s = (objective.ttft_limit_s - landing_s) / ttft_round_trips(setting)
        limit = min(limit, round_trip_s * setting.iterations / setting.in_flight)
    return limit


def subsets(zones: set[str]) -> Iterator[tuple[str, ...]]:
    for size in range(1, len(zones) + 1):
        yield from itertools.combinations(sorted(zones), size)
