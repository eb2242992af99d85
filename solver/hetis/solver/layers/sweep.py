"""The rate of a placement, compiled: a sweep of requests from the first layer to the last, shared by node weights.

Every layer is on some node, so requests that leave a node after its last layer find others to continue on. Nodes that
begin at that layer share them in proportion to their weights; if none begins there, nodes that hold the layer in their
middle do. `hetis.solver.layers.objective` defines the rate, and a test compares the two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.layers.compiled import kernel
from hetis.solver.layers.problem import BATCH_SHARE
from hetis.solver.layers.tables import FloatArray, IntArray, LayerTables


class SweepRoom(NamedTuple):
    """Reusable arrays for a sweep over n nodes. Requests enter node i for the e-th time at ``entry[i, e]``.

    ``share[i, e]`` is the share of all requests that do so, ``arrived[l]`` the share whose next layer is l.
    """

    entries: IntArray  # [n]
    entry: IntArray  # [n, L]
    share: FloatArray  # [n, L]
    arrived: FloatArray  # [L + 1]
    begins: IntArray  # [L] a node whose first layer this is, or -1
    beside: IntArray  # [n] another node with the same first layer, or -1


def new_sweep(num_nodes: int, num_layers: int) -> SweepRoom:
    """Return empty arrays for a sweep."""
    shape = (num_nodes, num_layers)
    return SweepRoom(
        entries=np.zeros(num_nodes, np.int64),
        entry=np.zeros(shape, np.int64),
        share=np.zeros(shape),
        arrived=np.zeros(num_layers + 1),
        begins=np.zeros(num_layers, np.int64),
        beside=np.zeros(num_nodes, np.int64),
    )


@kernel
def share_requests(first: IntArray, held: IntArray, weight: FloatArray, sweep: SweepRoom) -> bool:
    """Fill ``sweep`` for nodes with ``held`` layers from ``first`` (0: nothing); return False if a layer is missing."""
    n = first.shape[0]
    sweep.entries[:] = 0
    sweep.arrived[:] = 0.0
    sweep.arrived[0] = 1.0
    sweep.begins[:] = -1
    for i in range(n):
        if held[i] > 0:
            sweep.beside[i] = sweep.begins[first[i]]
            sweep.begins[first[i]] = i
    for layer in range(sweep.begins.shape[0]):
        if sweep.arrived[layer] <= 0.0:
            continue
        total = 0.0
        i = sweep.begins[layer]
        while i >= 0:
            total += weight[i]
            i = sweep.beside[i]
        if total > 0.0:
            i = sweep.begins[layer]
            while i >= 0:
                _enter(i, layer, sweep.arrived[layer] * weight[i] / total, first[i] + held[i], sweep)
                i = sweep.beside[i]
            continue
        for i in range(n):
            if first[i] < layer < first[i] + held[i]:
                total += weight[i]
        if total == 0.0:
            return False
        for i in range(n):
            if first[i] < layer < first[i] + held[i]:
                _enter(i, layer, sweep.arrived[layer] * weight[i] / total, first[i] + held[i], sweep)
    return True


@kernel
def _enter(i: int, layer: int, share: float, end: int, sweep: SweepRoom) -> None:
    sweep.entry[i, sweep.entries[i]] = layer
    sweep.share[i, sweep.entries[i]] = share
    sweep.entries[i] += 1
    sweep.arrived[end] += share


@kernel
def seconds_at(batch: float, sizes: FloatArray, seconds: FloatArray) -> float:
    """Return the seconds of a time table at ``batch``, as `TimeTable.at` does."""
    if batch <= sizes[0]:
        return float(seconds[0])
    right = 1
    while right < sizes.shape[0] - 1 and sizes[right] < batch:
        right += 1
    slope = (seconds[right] - seconds[right - 1]) / (sizes[right] - sizes[right - 1])
    return float(seconds[right - 1] + slope * (batch - sizes[right - 1]))


@kernel
def rate_of(
    first: IntArray,
    held: IntArray,
    weight: FloatArray,
    kind: IntArray,
    tables: LayerTables,
    flow_only: bool,
    sweep: SweepRoom,
) -> float:
    """Return the requests per second of a placement, or 0 if a layer is missing.

    With ``flow_only`` only measured token rates and cards count, as in a maximum flow.
    """
    if not share_requests(first, held, weight, sweep):
        return 0.0
    in_flight, slowest_s = np.inf, 0.0
    for i in range(first.shape[0]):
        if sweep.entries[i] == 0:
            continue
        t, k = kind[i], held[i] - 1
        end = first[i] + held[i]
        visits, computed = 0.0, 0.0
        for e in range(sweep.entries[i]):
            visits += sweep.share[i, e]
            computed += sweep.share[i, e] * (end - sweep.entry[i, e])
        in_flight = min(in_flight, tables.kv[t, k] / computed)
        slowest_s = max(slowest_s, visits * tables.rate_s[t, k])
        if held[i] < tables.num_layers:
            slowest_s = max(slowest_s, visits * tables.card_s * (tables.prompt_tokens + tables.output_tokens))
    if flow_only:
        return 1.0 / slowest_s
    round_trip_s = 0.0
    prompts = tables.prompt_tokens / tables.output_tokens
    for i in range(first.shape[0]):
        if sweep.entries[i] == 0:
            continue
        t, k = kind[i], held[i] - 1
        card_s = tables.card_s if held[i] < tables.num_layers else 0.0
        sizes, seconds = tables.decode_at[t, k], tables.decode_s[t, k]
        share, batches_s, visit_s = 0.0, 0.0, tables.latency_s
        for e in range(sweep.entries[i]):
            share += sweep.share[i, e]
            until = sweep.entry[i, e + 1] if e + 1 < sweep.entries[i] else first[i] + held[i]
            layers = until - sweep.entry[i, e]
            batch = BATCH_SHARE * in_flight * share
            visit_s += layers * (
                tables.wait_s[t, k] + seconds_at(batch, sizes, seconds) + (1 + batch) * tables.prompt_s[t, k]
            )
            batches_s += layers * (
                seconds_at(in_flight * share, sizes, seconds) / in_flight + share * tables.prompt_s[t, k]
            )
        sent = BATCH_SHARE * in_flight * share
        visit_s += card_s * (sent + (1 + sent) * prompts)
        round_trip_s += share * visit_s
        slowest_s = max(slowest_s, tables.output_tokens * batches_s)
    return min(in_flight / (tables.output_tokens * round_trip_s), 1.0 / slowest_s)
