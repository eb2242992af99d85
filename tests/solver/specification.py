"""The placement problem as one compact MILP, written to be read: the specification of the search and its oracle.

A maximum over products of choices looks nonlinear, since a rate is the inverse of a time that depends on every stage.
It is linear nonetheless, exactly, because the time of a stage is a *number* once its option and layers are chosen. Let
a binary y choose them, and let z be the rate that flows through that choice, 0 unless chosen: then ``u z`` is how busy
the choice is.

This works only for tiny fleets, or for a few (b, M, C) of larger ones, and only for unified replicas. Families with
prefill and decode replicas are refused, as are explicit links between nodes; the capacity of links between zones is not
modelled. Times and bytes are the checker's, not the search's. The classes of equal GPUs come from the search
(`placement/fleet.py`); the brute-force oracle of the tests, with classes and arithmetic of its own, judges both.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cvxpy
import numpy as np
import numpy.typing as npt

from hetis.solver.check.fleet import PoolShape, StageShape, slowest
from hetis.solver.check.memory import kv_block_tokens, kv_tokens_of_a_copy, rank_bytes, worker_bytes
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.setting import Setting, divides, head_groups_per_rank
from hetis.solver.check.timing import chunk_seconds, layer_seconds, slack, stage_seconds, tpot_per_t
from hetis.solver.cost import UNEVENNESS_STEP, unevenness_level
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.fleet import DeviceClass, device_classes
from hetis.solver.plan import ObjectiveKind, Status
from hetis.solver.problem import PlacementProblem
from tests.solver.oracle import ttft_round_trips

cp: Any = cvxpy  # its annotations cover only half of its exports
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecificationResult:
    """The result of the MILP within its time.

    ``value`` is 0 (infinity when minimising) without a plan; ``bound`` is proved for the slots and values given.
    ``replicas`` describe the plan to people, one sentence each.
    """

    status: Status
    value: float
    bound: float
    num_binaries: int
    solve_s: float
    replicas: tuple[str, ...]


def solve_specification(
    problem: PlacementProblem,
    *,
    num_replicas: int,
    num_stages: int,
    micro_batches: tuple[int, ...] | None = None,
    in_flight: tuple[int, ...] | None = None,
    chunk_tokens: tuple[int, ...] | None = None,
    time_limit_s: float = math.inf,
) -> SpecificationResult:
    """Return the best plan of at most ``num_replicas`` replicas of at most ``num_stages`` stages each.

    Values of b, M and C default to all of the family; a single value fixes each.

    Sets       r replica slots; s stage slots: the first one, those in the middle, the last one
               e settings: what the stages of a replica share, (b, M, C), its zones, the slack that K copies earn
               q choices of a slot: a setting, a stage type (class, n, c, pool class, p, k) and its layers l; in all
                 slots but the first also the empty stage, which takes no time
               g device classes, j nodes of a class, n sizes of TP groups (a pool card is a group of one)
    Data       u_q seconds per request, slack included; c_q copies; G_g GPUs per node
               a_qgn TP groups of size n taken of class g
               w_q = c_q / u_q requests/s a stage can do at most; M_e, K_e most copies; T_e limit on t
    Variables  h_re in {0,1}: slot r has setting e;  y_rsq in {0,1}: stage slot s of it has choice q
               v_re >= 0 requests/s at that setting;  z_rsq >= 0 the same, where it flows through choice q
               m_gjn >= 0 integer, TP groups of size n on node j
    Maximise   planned utilisation * sum_re v_re   (throughput: without it; cost, gpus: least sum of prices or GPUs)
    Such that  sum_e h_re <= 1                                    every r       (0: no replica)
               sum_(q of e) y_rsq = h_re                          every r,s,e   (a choice for every slot)
               sum_(s, q of e) l_q y_rsq = L h_re                 every r,e     (every layer once)
               y of "the whole model" in the first slot = y of "empty" in the last    every r,e
               sum_(q of e) z_rsq = v_re                          every r,s,e
               z_rsq <= w_q y_rsq                                 every r,s,q   (the busiest stage)
               sum_(s, q of e) u_q z_rsq / M_e <= h_re               every r,e     (the round trip)
               sum_(s, q of e) c_q y_rsq <= K_e h_re              every r,e     (micro-batches for all copies)
               v_re >= h_re / T_e                                 every r,e     (TTFT and TPOT)
               sum_rsq a_qgn y_rsq = sum_j m_gjn                  every g,n     (TP groups are on nodes)
               sum_n n m_gjn <= G_g                               every g,j     (and fit them)
               layers through slot s not at a forbidden cut       every r,s
               planned utilisation * sum_re v_re >= demand        cost and gpus only
               sum_e v_re >= sum_e v_r+1,e                        every r       (equal slots: the fastest first)

    Choices that do not fit in memory, or are too slow for the latency limits on their own, are never listed, so the
    family's rules for iterations with a chunk hold. A setting with a single micro-batch has a limit on unevenness.
    """
    if problem.cluster.network.between_nodes:
        raise InvalidProblemError("the specification does not know explicit links between nodes")
    family = problem.family
    if family.splits_roles:
        raise InvalidProblemError("the specification does not know prefill and decode replicas")
    family = replace(
        family,
        micro_batches=micro_batches or family.micro_batches,
        in_flight=in_flight or family.in_flight,
        chunk_tokens=chunk_tokens or family.chunk_tokens,
    )
    return _Formulation(replace(problem, family=family), num_replicas, num_stages).solve(time_limit_s)


class _Formulation:
    """The MILP of one problem; letters are as in `solve_specification`."""

    def __init__(self, problem: PlacementProblem, num_replicas: int, num_stages: int) -> None:
        self.problem, self.R, self.S = problem, num_replicas, num_stages
        sets = Sets.of(problem, num_stages)
        self.classes, self.shared, self.slots = sets.classes, sets.shared, sets.slots

    def solve(self, time_limit_s: float) -> SpecificationResult:
        if not self.slots[0]:
            return self._no_plan()
        R, E = self.R, len(self.shared)
        self.h, self.v = cp.Variable((R, E), boolean=True), cp.Variable((R, E), nonneg=True)
        self.y = [cp.Variable((R, len(slot)), boolean=True) for slot in self.slots]
        self.z = [cp.Variable((R, len(slot)), nonneg=True) for slot in self.slots]
        constraints = [*self._structure(), *self._rates(), *self._packing(), *self._cuts(), *self._demand()]
        milp = cp.Problem(self._objective(), constraints)
        options = {"mip_rel_gap": 1e-9, "mip_feasibility_tolerance": 1e-9, "primal_feasibility_tolerance": 1e-9}
        if math.isfinite(time_limit_s):
            options["time_limit"] = time_limit_s
        with warnings.catch_warnings():  # the status already reports that a time limit was hit
            warnings.filterwarnings("ignore", message="Solution may be inaccurate", category=UserWarning)
            milp.solve(solver=cp.HIGHS, **options)
        return self._result(milp)

    def _structure(self) -> list[Any]:
        """Return the constraints on settings, their choices, layers, the last stage, and the order of equal slots."""
        repeated = self.problem.model.num_layers - self.problem.model.prefix_layers
        rate = cp.sum(self.v, axis=1)
        constraints = [
            cp.sum(self.h, axis=1) <= 1,
            self._by_setting(self.y, lambda q: q.layers) == repeated * self.h,
            rate[:-1] >= rate[1:],
        ]
        for y, slot in zip(self.y, self.slots, strict=True):
            constraints.append(y @ self._setting_matrix(slot) == self.h)
        if self.S > 1:
            whole = self._setting_matrix(self.slots[0], lambda q: float(q.is_whole))
            empty = self._setting_matrix(self.slots[-1], lambda q: float(q.shape is None))
            constraints.append(self.y[0] @ whole == self.y[-1] @ empty)
        return constraints

    def _rates(self) -> list[Any]:
        """Return the constraints on the busiest stage, the round trip, copies' micro-batches, and latency."""
        num_gpus = self.problem.cluster.num_gpus()
        K = np.array([min(e.most_copies, num_gpus) for e in self.shared])
        T = np.array([e.t_limit_s for e in self.shared])
        constraints = [
            self._by_setting(self.z, self._round_trip_s) <= self.h,
            self._by_setting(self.y, lambda q: q.copies) <= self.h @ np.diag(K),
            self.v >= self.h @ np.diag(1 / T),
        ]
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
        shared = self.shared[q.shared]
        return q.u_s / shared.setting.in_flight

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

    # --- the answer

    def _no_plan(self) -> SpecificationResult:
        """Return the result if no stage holds even one layer within memory and limits."""
        value = 0.0 if self.problem.objective.maximises else math.inf
        return SpecificationResult(
            status=Status.INFEASIBLE, value=value, bound=value, num_binaries=0, solve_s=0.0, replicas=()
        )

    def _result(self, milp: Any) -> SpecificationResult:
        maximises = self.problem.objective.maximises
        nothing = 0.0 if maximises else math.inf
        found = milp.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE, cp.USER_LIMIT) and math.isfinite(milp.value)
        value = float(milp.value) if found else nothing
        has_plan = found and self.v.value is not None and float(np.sum(self.v.value)) > 1e-9
        if milp.status == cp.USER_LIMIT:
            status = Status.FEASIBLE if has_plan else Status.INTERRUPTED
            # cvxpy minimises the negative of a maximised objective.
            bound = float(milp.solver_stats.extra_stats.mip_dual_bound) * (-1.0 if maximises else 1.0)
        else:
            status, bound = (Status.OPTIMAL if has_plan else Status.INFEASIBLE), value
        return SpecificationResult(
            status=status,
            value=value,
            bound=bound,
            num_binaries=self.h.size + sum(y.size for y in self.y),
            solve_s=float(milp.solver_stats.solve_time or 0.0),
            replicas=tuple(self._describe(r) for r in range(self.R) if has_plan and self.h.value[r].max() > 0.5),
        )

    def _describe(self, r: int) -> str:
        chosen = [slot[int(np.argmax(y.value[r]))] for y, slot in zip(self.y, self.slots, strict=True)]
        setting = self.shared[chosen[0].shared].setting
        stages = " > ".join(_describe_stage(q.shape) for q in chosen if q.shape is not None)
        at = f"b {setting.micro_batch}, M {setting.in_flight}, C {setting.chunk_tokens}"
        return f"{stages} at {at}: {self.v.value[r].sum():.6g} requests/s"


def _num_groups(g: int, n: int) -> Callable[[Choice], float]:
    """Return a_qgn for one class and size."""
    return lambda q: float(q.groups.count((g, n)))


def _describe_stage(stage: StageShape) -> str:
    text = f"{stage.layers} layers on {stage.copies} x {stage.tp} {stage.gpu}"
    if stage.pool is None:
        return text
    pool = stage.pool
    return f"{text} ({pool.head_groups} head groups on {stage.copies} x {pool.cards} {pool.gpu})"


# --- sets and data: everything that the variables choose from, as numbers, with the same letters


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
    gpu: str | None  # None: any GPU type
    layers: tuple[int, int]  # fewest and most layers of a stage


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
    for (g, own), n, c in itertools.product(enumerate(classes), family.tp_sizes, (1,)):
        if n > own.gpus_per_node or n * c > own.available or not divides(model, n):
            continue
        shape = StageShape(gpu=own.gpu, tp=n, copies=c, layers=1, intra_link=own.intra, hop_link=own.nic)
        yield shape, ((g, n),) * c
        for (i, other), p in itertools.product(enumerate(classes), family.pool_sizes()):
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
