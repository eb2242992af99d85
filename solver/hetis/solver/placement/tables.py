"""The cost model tabulated for the search: plain arrays, one entry per iteration mix, rank type and pool.

A *rank type* s is a device class with a TP size; a *mix* x is a pair (b, C); roles of a stage are plain, first, last,
both (a stage that is first and last). What a stage costs is then a few look-ups away, see `options.py`;
`tabulation.py` fills the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hetis.solver.cost import Mix
from hetis.solver.placement.classes import DeviceClass, IntArray, Resources
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import WorkloadMoments

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

PLAIN, FIRST, LAST, BOTH = range(4)


class Tables(NamedTuple):
    """What the compiled kernels read. X mixes, F in-flight values, S rank types, N classes, shapes in brackets.

    Times are seconds per request: per repeated layer where the name says ``layer``, else per stage.
    """

    num_layers: int  # repeated layers to place, without the prefix
    prefix_layers: int
    kv_group_bytes: float  # kvb
    cut_floor: IntArray  # [num_layers + 1] the last allowed cut at or before each position
    micro_batch: IntArray  # [X]
    in_flight: IntArray  # [F]
    t_cap: FloatArray  # [X, F] the longest interval that meets the latency limits
    t_floor: float  # the shortest interval that keeps to a replica's share of the links between zones
    kv_tokens: FloatArray  # [X, F, copies] Tkv
    rank_class: IntArray  # [S]
    rank_tp: IntArray  # [S]
    rank_groups: IntArray  # [S] Gr
    room_bytes: FloatArray  # [S]
    layer_bytes: FloatArray  # [S] weights of a repeated layer
    first_bytes: FloatArray  # [S] embedding and prefix weights
    last_bytes: FloatArray  # [S] LM head
    tied_bytes: FloatArray  # [S] counted once where a stage is both and the weights are tied
    act_bytes: FloatArray  # [X, S]
    logit_bytes: FloatArray  # [X, S]
    layer_s: FloatArray  # [X, S] without attention of decoding requests
    own_s: FloatArray  # [X, S, max groups + 1] decode attention of kept groups
    hop_s: FloatArray  # [X, S]
    step_s: FloatArray  # [X, S]
    last_s: FloatArray  # [X, S]
    prefix_delta_s: FloatArray  # [X, S] a prefix layer takes this much longer than a repeated one
    available: IntArray  # [N]
    worker_room_bytes: FloatArray  # [N]
    pool_sizes: IntArray  # the numbers p of attention workers tried, ascending
    pool_start: IntArray  # [S, N] where the pool entries of (s, q) start in pool_s; -1: no such pool
    pool_s: FloatArray  # [X, total] decode attention with a pool plus KV shipping, over k = 1..Gr, then pool sizes


class Scope:
    """Zones that one replica may span, with the tables for the links among them, made when first asked for."""

    def __init__(self, zones: tuple[str, ...], tabulate: Callable[[tuple[str, ...]], Tables]) -> None:
        self.zones, self._tabulate = zones, tabulate

    @cached_property
    def tables(self) -> Tables:
        return self._tabulate(self.zones)


@dataclass(frozen=True, slots=True)
class Atlas:
    """Everything tabulated for one problem."""

    problem: PlacementProblem
    moments: WorkloadMoments
    classes: tuple[DeviceClass, ...]
    resources: Resources
    mixes: tuple[Mix, ...]
    ranks: tuple[tuple[int, int], ...]  # (class, tp)
    group_use: IntArray  # [S, rows] resources of one TP group
    card_use: IntArray  # [N, rows] resources of one attention worker
    pool_sizes: tuple[int, ...]
    scopes: tuple[Scope, ...]
