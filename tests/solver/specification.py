"""The placement problem as one compact MILP, written to be read: the specification of the search on an engine.

A maximum over products of choices looks nonlinear, since a rate is the inverse of a time that depends on every stage.
It is linear nonetheless, exactly, because the time of a stage is a *number* once its option and layers are chosen. Let
a binary y choose them, and let z be the rate that flows through that choice, 0 unless chosen: then ``u z`` is how busy
the choice is.

This works only for tiny fleets, and only for unified replicas without copies that share experts, on fleets without
explicit links between nodes. Times and bytes are the checker's, not the search's. The classes of equal GPUs come from
the search (`placement/fleet.py`); the brute-force oracle of the tests, with classes and arithmetic of its own, judges
both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cvxpy
import numpy as np
import numpy.typing as npt

from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import PoolShape, StageShape, slowest
from hetis.solver.check.setting import Setting, divides, head_groups_per_rank
from hetis.solver.check.timing import chunk_seconds, layer_seconds, slack, stage_seconds
from hetis.solver.placement.fleet import DeviceClass, device_classes
from hetis.solver.plan import ObjectiveKind
from hetis.solver.problem import PlacementProblem
from tests.solver.best_replicas import fits_memory, rules_of, t_limit_s, ttft_round_trips

cp: Any = cvxpy  # its annotations cover only half of its exports
Array = npt.NDArray[np.float64]


def solve_specification(
    problem: PlacementProblem, *, num_replicas: int, num_stages: int, micro_batches: tuple[int, ...] | None = None
) -> float:
    """Return the value of the best plan of at most ``num_replicas`` replicas of at most ``num_stages`` stages each.

    It is 0 (infinity when minimising) without a plan. ``micro_batches`` may limit b to fewer values than the family's.

    Sets       r replica slots; s stage slots: the first one, those in the middle, the last one
               e settings: what the stages of a replica share: (b, M, C), its zone, TP size n, and attention workers
                 (class, p, k) or none
               q choices of a slot: a setting, a class and its layers l, or the empty stage, which takes no time: in
                 the middle, and in the last slot if the first one holds the whole model (M_e = 1)
               g device classes, j nodes of a class, n sizes of TP groups (a pool card is a group of one)
    Data       u_q seconds per request, slack included;  a_qgn TP groups of size n taken of class g;  G_g GPUs per node
               w_q = 1 / u_q requests/s a stage can do at most;  M_e stages and micro-batches;  T_e limit on t
    Variables  h_re in {0,1}: slot r has setting e;  y_rsq in {0,1}: stage slot s of it has choice q
               v_re >= 0 requests/s at that setting;  z_rsq >= 0 the same, where it flows through choice q
               m_gjn >= 0 integer, TP groups of size n on node j
    Maximise   planned utilisation * sum_re v_re   (throughput: without it; cost, gpus: least sum of prices or GPUs)
    Such that  sum_e h_re <= 1                                    every r       (0: no replica)
               sum_(q of e) y_rsq = h_re                          every r,s,e   (a choice for every slot)
               sum_(s, q of e) l_q y_rsq = L h_re                 every r,e     (every layer once)
               sum_(s, q of e not empty) y_rsq = M_e h_re         every r,e     (a micro-batch for each stage)
               sum_(q of e) z_rsq = v_re                          every r,s,e
               z_rsq <= w_q y_rsq                                 every r,s,q   (the slowest stage)
               sum_(s, q of e) u_q z_rsq / M_e <= h_re            every r,e     (the round trip)
               v_re >= h_re / T_e                                 every r,e     (TTFT and TPOT)
               sum_rsq a_qgn y_rsq = sum_j m_gjn                  every g,n     (TP groups are on nodes)
               sum_n n m_gjn <= G_g                               every g,j     (and fit them)
               layers through slot s not at a forbidden cut       every r,s
               planned utilisation * sum_re v_re >= demand        cost and gpus only
               sum_e v_re >= sum_e v_r+1,e                        every r       (equal slots: the fastest first)

    Choices that do not fit in memory, or are too slow for the latency limits on their own, are never listed, so the
    family's rule for iterations with a chunk holds.
    """
    assert not problem.cluster.network.between_nodes, "the specification does not know explicit links between nodes"
    assert not problem.family.splits_roles, "the specification does not know prefill and decode replicas"
    family = replace(problem.family, micro_batches=micro_batches or problem.family.micro_batches)
    return _Formulation(replace(problem, family=family), num_replicas, num_stages).value()


class _Formulation:
    """The MILP of one problem; letters are as in `solve_specification`."""

    def __init__(self, problem: PlacementProblem, num_replicas: int, num_stages: int) -> None:
        self.problem, self.R = problem, num_replicas
        sets = Sets.of(problem, num_stages)
        self.classes, self.shared, self.slots = sets.classes, sets.shared, sets.slots

    def value(self) -> float:
        nothing = 0.0 if self.problem.objective.maximises else math.inf
        if not self.slots[0]:  # no stage holds even one layer within memory and limits
            return nothing
        R, E = self.R, len(self.shared)
        self.h, self.v = cp.Variable((R, E), boolean=True), cp.Variable((R, E), nonneg=True)
        self.y = [cp.Variable((R, len(slot)), boolean=True) for slot in self.slots]
        self.z = [cp.Variable((R, len(slot)), nonneg=True) for slot in self.slots]
        constraints = [*self._structure(), *self._rates(), *self._packing(), *self._cuts(), *self._demand()]
        milp = cp.Problem(self._objective(), constraints)
        options = {"mip_rel_gap": 1e-9, "mip_feasibility_tolerance": 1e-9, "primal_feasibility_tolerance": 1e-9}
        milp.solve(solver=cp.HIGHS, **options)
        return float(milp.value) if milp.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE) else nothing

    def _structure(self) -> list[Any]:
        """Return the constraints on settings, choices, layers, numbers of stages, and the order of equal slots."""
        repeated = self.problem.model.num_layers - self.problem.model.prefix_layers
        depth = np.diag([float(e.setting.in_flight) for e in self.shared])
        rate = cp.sum(self.v, axis=1)
        return [
            cp.sum(self.h, axis=1) <= 1,
            self._by_setting(self.y, lambda q: q.layers) == repeated * self.h,
            self._by_setting(self.y, lambda q: float(q.shape is not None)) == self.h @ depth,
            rate[:-1] >= rate[1:],
            *(y @ self._setting_matrix(slot) == self.h for y, slot in zip(self.y, self.slots, strict=True)),
        ]

    def _rates(self) -> list[Any]:
        """Return the constraints on the slowest stage, the round trip, and latency."""
        T = np.array([e.t_limit_s for e in self.shared])
        constraints = [self._by_setting(self.z, self._round_trip_s) <= self.h, self.v >= self.h @ np.diag(1 / T)]
        for y, z, slot in zip(self.y, self.z, self.slots, strict=True):
            w = np.array([q.rate_limit for q in slot])
            constraints += [z @ self._setting_matrix(slot) == self.v, z <= cp.multiply(y, np.tile(w, (self.R, 1)))]
        return constraints

    def _packing(self) -> list[Any]:
        """Return the constraints that TP groups of every size fit inside the nodes of their class."""
        sizes = [n for n in self.problem.family.tp_sizes if n > 1]
        constraints = []
        for g, device_class in enumerate(self.classes):
            m = {n: cp.Variable(device_class.num_nodes, integer=True) for n in (1, *sizes)}
            for n, of_size in m.items():
                taken = self._total(_num_groups(g, n))
                constraints += [of_size >= 0, taken == cp.sum(of_size)]
            constraints.append(sum(n * of_size for n, of_size in m.items()) <= device_class.gpus_per_node)
        return constraints

    def _cuts(self) -> list[Any]:
        """Return the constraints that stages end where the model allows a cut; ``at`` chooses the cut."""
        model = self.problem.model
        allowed = [i for i in range(model.prefix_layers, model.num_layers + 1) if model.allowed_cut(i)]
        if len(allowed) == model.num_layers - model.prefix_layers + 1:
            return []
        constraints, through = [], 0
        for y, slot in zip(self.y[:-1], self.slots[:-1], strict=True):
            through = through + y @ np.array([q.layers for q in slot])
            at = cp.Variable((self.R, len(allowed)), boolean=True)
            constraints += [
                cp.sum(at, axis=1) <= 1,
                through == at @ np.array([i - model.prefix_layers for i in allowed]),
            ]
        return constraints

    def _demand(self) -> list[Any]:
        demand = self.problem.objective.demand_rps
        if self.problem.objective.maximises or demand is None:
            return []
        return [self.problem.assumptions.planned_utilisation * cp.sum(self.v) >= demand]

    def _objective(self) -> Any:
        kind = self.problem.objective.kind
        if kind is ObjectiveKind.THROUGHPUT:
            return cp.Maximize(cp.sum(self.v))
        if kind is ObjectiveKind.GOODPUT:
            return cp.Maximize(self.problem.assumptions.planned_utilisation * cp.sum(self.v))
        prices = [(g.usd_per_hour or 0.0) if kind is ObjectiveKind.COST else 1.0 for g in self.classes]
        return cp.Minimize(self._total(lambda q: sum(prices[g] * n for g, n in q.groups)))

    def _round_trip_s(self, q: Choice) -> float:
        return q.u_s / self.shared[q.shared].setting.in_flight

    def _setting_matrix(self, slot: Sequence[Choice], number_of: Callable[[Choice], float] = lambda q: 1.0) -> Array:
        """Return a number of choice q in the column of its setting e, shape [choices, settings]."""
        matrix = np.zeros((len(slot), len(self.shared)))
        matrix[np.arange(len(slot)), [q.shared for q in slot]] = [number_of(q) for q in slot]
        return matrix

    def _by_setting(self, variables: list[Any], number_of: Callable[[Choice], float]) -> Any:
        """Return ``sum_(s, q of e) number_of(q) x_rsq`` for x = y or z, shape [replicas, settings]."""
        return sum(x @ self._setting_matrix(slot, number_of) for x, slot in zip(variables, self.slots, strict=True))

    def _total(self, number_of: Callable[[Choice], float]) -> Any:
        """Return ``sum_rsq number_of(q) y_rsq``."""
        return cp.sum(self._by_setting(self.y, number_of))


def _num_groups(g: int, n: int) -> Callable[[Choice], float]:
    """Return a_qgn for one class and size."""
    return lambda q: float(q.groups.count((g, n)))


# --- sets and data: everything that the variables choose from, as numbers, with the same letters


Groups = tuple[tuple[int, int], ...]  # (g, n) of every TP group; each pool card is a group of one


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The attention workers of every stage of a replica: p cards of a class with k head groups of each rank."""

    device_class: int
    cards: int
    head_groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """e: what all stages of a replica share, including GPU type and layers if the family does not mix them."""

    setting: Setting
    zone: str
    tp: int
    pool: Pool | None
    t_limit_s: float  # T
    chunk_limit_s: float  # longest iteration of a stage with a chunk
    gpu: str | None  # None: any GPU type
    layers: tuple[int, int]  # fewest and most layers of a stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """q: a stage of a setting, or the empty stage (``shape`` is None)."""

    shared: int  # e
    shape: StageShape | None
    groups: Groups
    u_s: float  # including slack
    rate_limit: float  # w

    @property
    def layers(self) -> int:
        """l"""
        return self.shape.layers if self.shape else 0


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
        shared = tuple(one for one in _shared(problem, classes) if one.setting.in_flight <= num_stages)
        listed = _Choices(problem, classes, shared)
        first = (*listed.of_slot(is_first=True, is_last=True), *listed.of_slot(is_first=True, is_last=False))
        if num_stages == 1:
            return Sets(classes=classes, shared=shared, slots=(first,))
        empty = tuple(_empty_stages(shared, first))
        middle = (*listed.of_slot(is_first=False, is_last=False), *empty) if num_stages > 2 else ()
        after_whole = (q for q in empty if shared[q.shared].setting.in_flight == 1)
        last = (*listed.of_slot(is_first=False, is_last=True), *after_whole)
        return Sets(classes=classes, shared=shared, slots=(first, *[middle] * (num_stages - 2), last))


def _shared(problem: PlacementProblem, classes: Sequence[DeviceClass]) -> Iterator[Shared]:
    """Yield e: every combination of what the stages of a replica share."""
    family, cluster, engine, rederivation = problem.family, problem.cluster, rules_of(problem), Rederivation(problem)
    repeated, limit_s = problem.model.num_layers - problem.model.prefix_layers, problem.objective.ttft_limit_s
    types = [None] if family.mixed_types else list(dict.fromkeys(s.gpu for g in cluster.node_groups for s in g.gpus))
    # Stages that differ by at most one layer have some number of layers or one more.
    layers = [(1, repeated)] if family.uneven_layers else [(few, few + 1) for few in range(1, repeated + 1)]
    for b, M, C in itertools.product(family.micro_batches, family.in_flight, family.chunk_tokens):
        if engine.max_stages < M or not family.engine_settings.allows(micro_batch=b, in_flight=M):
            continue
        setting = rederivation.setting(micro_batch=b, in_flight=M, chunk_tokens=C)
        trip_s = math.inf if limit_s is None else limit_s / ttft_round_trips(setting)
        for zone, n, gpu, held in itertools.product(cluster.zones(), family.tp_sizes, types, layers):
            for pool in (None, *_pools(problem, classes, zone, n)) if engine.max_pooled_stages >= M else (None,):
                yield Shared(
                    setting=setting,
                    zone=zone,
                    tp=n,
                    pool=pool,
                    t_limit_s=t_limit_s(setting, 0.0),
                    chunk_limit_s=trip_s / M,
                    gpu=gpu,
                    layers=held,
                )


def _pools(problem: PlacementProblem, classes: Sequence[DeviceClass], zone: str, tp: int) -> Iterator[Pool]:
    model = problem.model
    if not model.heads_can_move or tp > model.head_groups:
        return
    for (g, c), p in itertools.product(enumerate(classes), problem.family.pool_sizes()):
        if c.zone == zone and p <= c.available:
            for k in range(1, head_groups_per_rank(model, tp) + 1):
                yield Pool(device_class=g, cards=p, head_groups=k)


@dataclass(frozen=True, slots=True)
class _Choices:
    """The choices q of the slots."""

    problem: PlacementProblem
    classes: tuple[DeviceClass, ...]
    shared: tuple[Shared, ...]

    def of_slot(self, *, is_first: bool, is_last: bool) -> Iterator[Choice]:
        """Yield every stage that fits in memory and is not too slow on its own."""
        model, network, least = self.problem.model, self.problem.cluster.network, rules_of(self.problem).min_layers
        repeated = model.num_layers - model.prefix_layers
        fewest, most = (repeated, repeated) if is_first and is_last else (1, repeated - 1)
        fewest = max(fewest, least - (model.prefix_layers if is_first else 0))
        for (e, shared), (g, own) in itertools.product(enumerate(self.shared), enumerate(self.classes)):
            if (is_first and is_last) != (shared.setting.in_flight == 1) or not self._may_have(shared, own):
                continue
            inside, pool, groups = network.zone_link(own.zone, own.zone), None, ((g, shared.tp),)
            hop = slowest([own.nic, inside])
            if shared.pool is not None:
                cards = self.classes[shared.pool.device_class]
                link = slowest([own.nic, cards.nic, inside])
                pool = PoolShape(
                    gpu=cards.gpu, cards=shared.pool.cards, head_groups=shared.pool.head_groups, link=link
                )  # fmt: skip
                groups += ((shared.pool.device_class, 1),) * shared.pool.cards
            shape = StageShape(
                gpu=own.gpu, tp=shared.tp, copies=1, layers=1, intra_link=own.intra, hop_link=hop,
                pool=pool,
            )  # fmt: skip
            layer_s = layer_seconds(shared.setting, shape)
            one_layer_s = stage_seconds(shared.setting, shape, is_first=is_first, is_last=is_last)
            for held in range(max(fewest, shared.layers[0]), min(most, shared.layers[1]) + 1):
                stage = replace(shape, layers=held)
                if not fits_memory(shared.setting, stage, is_first=is_first, is_last=is_last):
                    break
                u = one_layer_s + (held - 1) * layer_s
                stretched_s = (1 + slack(shared.setting, stage, shared.setting.in_flight)) * u
                chunk_s = chunk_seconds(shared.setting, stage, is_first=is_first, is_last=is_last)
                in_time = chunk_s <= shared.chunk_limit_s * (1 + 1e-9)
                if in_time and shared.t_limit_s >= stretched_s * (1 - 1e-9):
                    yield Choice(shared=e, shape=stage, groups=groups, u_s=stretched_s, rate_limit=1.0 / stretched_s)

    def _may_have(self, shared: Shared, own: DeviceClass) -> bool:
        """Return whether stages of a setting may be of this class."""
        types = {own.gpu} if shared.pool is None else {own.gpu, self.classes[shared.pool.device_class].gpu}
        fits = shared.tp <= own.gpus_per_node and divides(self.problem.model, shared.tp)
        return fits and own.zone == shared.zone and (shared.gpu is None or types == {shared.gpu})


def _empty_stages(shared: Sequence[Shared], first: Sequence[Choice]) -> Iterator[Choice]:
    """Yield the empty stage of every setting, which passes any rate that a first stage can reach."""
    for e in range(len(shared)):
        w = max((q.rate_limit for q in first if q.shared == e), default=0.0)
        yield Choice(shared=e, shape=None, groups=(), u_s=0.0, rate_limit=w)
