"""The cost model tabulated for the search: plain arrays, with one entry per iteration mix, rank type and pool.

A *rank type* s is a device class with a TP size, or with a number of GPUs that form d copies which share experts (each
with as many of the GPUs). A *mix* x is a pair (b, C), which is (0, C) for a prefill replica and (b, 0) for a decode
replica; there are further mixes for every d, which only rank types with that d may have: these form a replica on their
own, with one iteration of all copies in flight. Roles of a stage are plain, first, last, and both (a stage that is
first and last). A stage's cost then takes a few look-ups (`stage_cost.py`). `tabulation.py` fills the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hetis.solver.mixes import (
    Mix,
    Regime,
    chunk_spread,
    chunks_ahead,
    regime_together,
    regimes,
    tpot_per_interval,
    ttft_s,
)
from hetis.solver.placement.fleet import DeviceClass, IntArray, Part, Resources, Routes
from hetis.solver.plan import ALONE, Lanes, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import WorkloadMoments

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

PLAIN, FIRST, LAST, BOTH = range(4)
NO_ROOM = 1e30  # KV tokens where engine settings exclude a mix; finite, because it is multiplied by 0 head groups


class ChunkTables(NamedTuple):
    """Seconds of one iteration with a chunk in a unified replica's stages; zeros for other mixes."""

    layer_s: FloatArray  # [X, S] without decode attention
    hop_s: FloatArray  # [X, S]
    step_s: FloatArray  # [X, S]
    plugin_step_s: FloatArray  # [X]
    plugin_last_s: FloatArray  # [X]
    last_s: FloatArray  # [X, S]
    prefix_delta_s: FloatArray  # [X, S]
    own_s: FloatArray  # [X, S, max groups + 1] decode attention of kept groups
    pool_s: FloatArray  # [X, total] decode attention with a pool, including the cost of KV shipping


class Tables(NamedTuple):
    """The costs of stages, looked up: X mixes, F in-flight values, S rank types, N classes, shapes in brackets.

    Times are seconds per request, per repeated layer if the name has ``layer``, otherwise per stage. ``layer_s``
    and ``act_bytes`` are inf where a rank type may not have a mix.
    """

    num_layers: int  # repeated layers to place, without the prefix
    prefix_layers: int
    draft_layers: int  # drafting layers on the last stage
    kv_group_bytes: float  # kvb
    cut_floor: IntArray  # [num_layers + 1] the last allowed cut at or before each position
    micro_batch: IntArray  # [X]
    in_flight: IntArray  # [F]
    iterations: FloatArray  # [X] n_it
    chunk_iterations: FloatArray  # [X] nc
    without_chunk: FloatArray  # [X, F] (1 - phi)^M: the probability that no micro-batch in flight carries a chunk
    t_cap: FloatArray  # [X, F] the longest interval that meets the latency limits
    trip_cap: FloatArray  # [X, F] the longest round trip with a chunk that meets them; inf except for unified mixes
    slowest_landing_s: FloatArray  # [X] landing time that a TTFT limit sets aside
    kv_tokens: FloatArray  # [X, F] Tkv; NO_ROOM where engine settings exclude it
    prompt_tokens: FloatArray  # [X, F] Tpre: part of Tkv that a rank keeps of pooled groups, too
    state_bytes: FloatArray  # [X, F] of a layer on all ranks that divide them, for requests' states
    rank_class: IntArray  # [S]
    rank_tp: IntArray  # [S] GPUs of a TP group, or of all copies that share their experts
    state_ranks: IntArray  # [S] those of them among which ``state_bytes`` are divided
    rank_dp: IntArray  # [S] d, 1 without expert parallelism
    rank_groups: IntArray  # [S] Gr
    room_bytes: FloatArray  # [S]
    layer_bytes: FloatArray  # [S] weights of a repeated layer
    first_bytes: FloatArray  # [S] embedding, vision and prefix weights
    last_bytes: FloatArray  # [S] LM head and drafting layer
    tied_bytes: FloatArray  # [S] counted once if a stage is both and the weights are tied
    act_bytes: FloatArray  # [X, F, S]
    logit_bytes: FloatArray  # [X, F, S]
    layer_s: FloatArray  # [X, S] without decode attention
    own_s: FloatArray  # [X, S, max groups + 1] decode attention of kept groups
    hop_s: FloatArray  # [X, S]
    step_s: FloatArray  # [X, S]
    plugin_step_s: FloatArray  # [X] added to ``step_s`` of a stage with a pool
    plugin_last_s: FloatArray  # [X] added to ``last_s`` of a stage with a pool
    last_s: FloatArray  # [X, S]
    prefix_delta_s: FloatArray  # [X, S] additional time of a prefix layer over a repeated one
    chunk: ChunkTables
    wire_s: FloatArray  # [X, S] least time of a layer while its KV leaves or arrives; 0 for unified mixes
    landing_s: FloatArray  # [X, S] time for a prompt's last chunk of KV to leave the last layer; prefill mixes only
    available: IntArray  # [N]
    worker_room_bytes: FloatArray  # [N]
    pool_sizes: IntArray  # the numbers p of attention workers tried, ascending
    pool_start: IntArray  # [S, N] where the pool entries of (s, q) start in pool_s; -1: no such pool
    pool_s: FloatArray  # [X, total] attention with a pool, including KV shipping, over k = 1..Gr, then pool sizes
    least_pool_start: IntArray  # [S, N] where the least over k of (s, q) start, by pool size
    least_pool_s: FloatArray  # [X, least total]


class LatencyCaps(NamedTuple):
    """The longest times that keep the latency limits, by mix and iterations in flight; [X, F] each."""

    interval_s: FloatArray
    round_trip_s: FloatArray  # of one with a chunk; only unified replicas have others, which make a mean misleading


class Trips(NamedTuple):
    """What `latency_caps` needs and landing times do not change, by mix and iterations in flight; [X, F] each."""

    interval_s: FloatArray  # the longest that keeps the limit on TPOT
    of_prompts: FloatArray  # p95 TTFT in round trips with a chunk, 0 for decode replicas


def trips_of(problem: PlacementProblem, moments: WorkloadMoments, mixes: Sequence[Mix]) -> Trips:
    """Return the round trips of requests at the problem's utilisation."""
    limit_s, in_flight = problem.objective.tpot_limit_s, problem.family.in_flight
    interval_s, of_prompts = np.full((len(mixes), len(in_flight)), np.inf), np.zeros((len(mixes), len(in_flight)))
    for x, mix in enumerate(mixes):
        if limit_s is not None and mix.role is not Role.PREFILL:
            interval_s[x] = [limit_s / tpot_per_interval(problem.model, mix, m) for m in in_flight]
        if mix.role is not Role.DECODE:
            ahead = chunks_ahead(moments, problem.assumptions, mix)
            of_prompts[x] = [ttft_s(ahead, 1.0, 1.0 / m) for m in in_flight]
    return Trips(interval_s, of_prompts)


def latency_caps(
    problem: PlacementProblem, mixes: Sequence[Mix], trips: Trips, landing_s: FloatArray, reserved_s: float = 0.0
) -> LatencyCaps:
    """Return the caps with these landing times by mix; ``reserved_s`` of the TTFT limit are set aside for waiting."""
    interval_s, round_trip_s = trips.interval_s.copy(), np.full_like(trips.of_prompts, np.inf)
    if problem.objective.ttft_limit_s is not None:
        limit_s, in_flight = problem.objective.ttft_limit_s - reserved_s, np.array(problem.family.in_flight)
        has_prompts = np.array([mix.role is not Role.DECODE for mix in mixes], dtype=bool)
        count, iterations = (
            trips.of_prompts[has_prompts],
            np.array([mix.iterations for mix in mixes])[has_prompts, None],
        )
        longest_s = np.maximum(0.0, limit_s - landing_s[has_prompts, None]) / (count * in_flight / iterations)
        interval_s[has_prompts] = np.minimum(interval_s[has_prompts], longest_s)
        is_unified = np.array([mix.role is Role.UNIFIED for mix in mixes], dtype=bool)
        round_trip_s[is_unified] = limit_s / trips.of_prompts[is_unified]
    return LatencyCaps(interval_s, round_trip_s)


class Scope:
    """GPUs that one replica of some roles may use: those in its part of the fleet.

    ``primaries`` are the device classes whose GPUs may compute layers, those of a build (numbered from 0); None: all of
    them. Tables for the links in this part are made on first use. Prefill and decode replicas exchange KV in ``place``,
    by default the whole zone, of which the part is a part, with those whose KV is of the same kind (``kv``).
    ``number`` is that of the range of classes that they serve.
    """

    def __init__(
        self, part: Part, roles: tuple[Role, ...], tabulate: Callable[[], Tables],
        primaries: frozenset[int] | None = None, kv: int = 0, place: Part | None = None, number: int = 0,
    ) -> None:  # fmt: skip
        self.part, self.roles, self.primaries, self.kv, self.number = part, roles, primaries, kv, number
        self.place = place or Part(part.zones)
        self._tabulate = tabulate

    @cached_property
    def tables(self) -> Tables:
        return self._tabulate()

    @property
    def zones(self) -> tuple[str, ...]:
        return self.part.zones

    def serves(self, mix: Mix) -> bool:
        """Return whether replicas of this mix are searched for in this scope."""
        return mix.role in self.roles and not (mix.sends_afar and (self.place.blocks is not None or self.number > 0))

    def computes_on(self, device_class: int) -> bool:
        """Return whether GPUs of a class may compute layers in this scope's build."""
        return self.primaries is None or device_class in self.primaries

    def changed(self, change: Callable[[Tables], Tables]) -> Scope:
        """Return the scope with ``change`` applied to its tables when they are made."""
        return Scope(
            self.part, self.roles, lambda: change(self.tables), self.primaries, self.kv, self.place, self.number
        )  # fmt: skip

    def of_range(self, number: int) -> Scope:
        """Return the scope for a range of classes."""
        tables = lambda: self.tables  # noqa: E731
        return Scope(self.part, self.roles, tables, self.primaries, self.kv, self.place, number)

    def without(self, out: BoolArray) -> Scope:
        """Return the scope without the GPUs of the classes marked in ``out`` [N]."""
        return self.changed(lambda tables: tables._replace(available=np.where(out, 0, tables.available)))


@dataclass(frozen=True)
class CostTables:
    """All tables of one problem.

    If its workload has classes, ``ranges`` are the tables of the requests of each range; these have the scopes, with
    numbers of their own, and all else is that of all requests. Mixes have the same (b, C) in each.
    """

    problem: PlacementProblem
    moments: WorkloadMoments
    classes: tuple[DeviceClass, ...]
    resources: Resources
    mixes: tuple[Mix, ...]
    ranks: tuple[tuple[int, int], ...]  # (class, GPUs)
    rank_dp: tuple[int, ...]  # number of copies that share their experts on these GPUs, 1 without expert parallelism
    group_use: IntArray  # [S, rows] resources of one TP group
    card_use: IntArray  # [N, rows] resources of one attention worker
    pool_sizes: tuple[int, ...]
    scopes: tuple[Scope, ...]
    routes: Routes
    ranges: tuple[CostTables, ...] = ()
    # What searches of these tables have found that no limit on latency changes, see `candidates` and `enumeration`.
    shared: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    # What searches of any tables have found of stages, by all the times that it follows from, see `candidates`.
    evaluated: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def of_scope(self, scope: int) -> CostTables:
        """Return the tables whose mixes, averages and limits are those of the requests that a scope's replicas serve.

        Their scopes have other numbers.
        """
        return self.ranges[self.scopes[scope].number] if self.ranges else self

    @property
    def has_ttft_limit(self) -> bool:
        return self.problem.objective.ttft_limit_s is not None

    def at(self, utilisation: float, lanes: Lanes = ALONE, reserved: float = 0.0) -> CostTables:
        """Return the tables of plans that serve this share of their saturated rate, with so many replicas together.

        A share ``reserved`` of the limit on TTFT is set aside for waiting. What is ``shared`` stays so.
        """
        problem = self.problem.at(utilisation, lanes)
        if self.ranges:
            names = problem.ranges()
            ranges = [
                one.at(utilisation, lanes.of_pool(own), reserved) for own, one in zip(names, self.ranges, strict=True)
            ]
            return replace(self, problem=problem, scopes=scopes_of_ranges(ranges), ranges=tuple(ranges))
        reserved_s = reserved * (problem.objective.ttft_limit_s or 0.0)
        trips = trips_of(problem, self.moments, self.mixes)

        def change(tables: Tables) -> Tables:
            caps = latency_caps(problem, self.mixes, trips, tables.slowest_landing_s, reserved_s)
            interval_s = np.where(tables.kv_tokens < NO_ROOM, caps.interval_s, 0.0)
            return tables._replace(t_cap=interval_s, trip_cap=caps.round_trip_s)

        return replace(self, problem=problem, scopes=tuple(scope.changed(change) for scope in self.scopes))

    @cached_property
    def chunk_spread(self) -> float:
        """The spread of a chunk's work, by which `regimes` differ."""
        return chunk_spread(self.problem.model, self.moments)

    def regimes(self, role: Role) -> tuple[Regime, Regime]:
        """Return a role's pipeline regimes with at least two micro-batches per stage copy, and with at least one."""
        return regimes(self.problem.assumptions, role, self.chunk_spread)

    def regime_together(self, mix: int) -> Regime:
        """Return the regime of replicas with one iteration in flight, of one copy or of all that share experts."""
        x = self.mixes[mix]
        return regime_together(x.role, self.chunk_spread, x.attention_dp)

    def rank_of(self, device_class: int, gpus: int, attention_dp: int) -> int | None:
        """Return the rank type of these GPUs, if there is one."""
        kinds = zip(self.ranks, self.rank_dp, strict=True)
        return next((s for s, kind in enumerate(kinds) if kind == ((device_class, gpus), attention_dp)), None)

    def side_of(self, scope: int, mix: int) -> int:
        """Return the master's side of replicas of a scope and mix."""
        x, here = self.mixes[mix], self.scopes[scope]
        if x.role is Role.UNIFIED:
            return self.routes.unified(here.number)
        place = self.routes.place(here.place, here.kv, here.number)
        return self.routes.side(x.role, place, sends_afar=x.sends_afar)


def scopes_of_ranges(ranges: Sequence[CostTables]) -> tuple[Scope, ...]:
    """Return the scopes of the tables of all ranges of classes."""
    return tuple(scope.of_range(number) for number, one in enumerate(ranges) for scope in one.scopes)
