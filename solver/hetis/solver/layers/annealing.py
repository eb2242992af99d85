"""Compiled simulated annealing over placements: the layers that every node holds, and its weight for requests.

A sweep from the first layer to the last values a placement. Every layer is on some node, so requests that leave a node
after its last layer find others to continue on. Nodes that begin at that layer share them in proportion to their
weights; if none begins there, nodes that hold the layer in their middle do. `judge` defines the rate, and a test
compares the two.

All layers cost the same, so what matters is how long ranges are and which nodes share them. Moves keep ranges together:
nodes that begin or end at one layer move with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis.solver.compiled import kernel_of
from hetis.solver.layers.problem import BATCH_SHARE, WAIT_SHARE, LayersProblem

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

kernel = kernel_of(Path(__file__).parent)

MOST_TILT, MOST_WILD_TILT = 8.0, 1000.0  # largest ratio of a node's weight to its KV room per layer, or its inverse
NEW_TILT = 0.2  # with wild weights, share of nodes in a new place that get an arbitrary weight


class LayerTables(NamedTuple):
    """Arrays over n nodes, T node types, K layers held (column k - 1), Q points of a time table, padded with its slope.

    Seconds of one layer: ``wait_s`` for any batch, ``prompt_s`` of a prompt per output token, ``decode_s`` of
    ``decode_at`` sequences. ``rate_s`` is the seconds of a request by the measured tokens per second.
    """

    num_layers: int
    kind: IntArray  # [n] type of every node
    most: IntArray  # [T] layers that a node can hold
    kv: FloatArray  # [T, K] requests in flight, times layers, for which there is room
    rate_s: FloatArray  # [T, K]
    wait_s: FloatArray  # [T, K]
    prompt_s: FloatArray  # [T, K]
    decode_at: FloatArray  # [T, K, Q]
    decode_s: FloatArray  # [T, K, Q]
    latency_s: float
    card_s: float  # per token
    prompt_tokens: float
    output_tokens: float


class LayerPlacement(NamedTuple):
    """Node i holds ``held[i]`` layers from ``first[i]``, none if 0; ``tilt[i]`` multiplies its weight."""

    first: IntArray
    held: IntArray
    tilt: FloatArray


class FlowSweep(NamedTuple):
    """Reusable arrays for a sweep over n nodes. Requests enter node i for the e-th time at ``entry[i, e]``.

    ``share[i, e]`` is the share of all requests that do so, ``arrived[l]`` the share whose next layer is l.
    """

    weight: FloatArray  # [n]
    entries: IntArray  # [n]
    entry: IntArray  # [n, L]
    share: FloatArray  # [n, L]
    arrived: FloatArray  # [L + 1]
    begins: IntArray  # [L] a node whose first layer this is, or -1
    beside: IntArray  # [n] another node with the same first layer, or -1


def tabulate(problem: LayersProblem) -> LayerTables:
    """Return all data of a problem that the search needs, as arrays."""
    kinds, links = problem.node_types, problem.links
    most = np.array([problem.most_layers(kind) for kind in kinds], np.int64)
    shape = (len(kinds), int(most.max()))
    points = 1 + max(len(kind.decode_table(1).sizes) for kind in kinds)
    kv, rate_s, wait_s, prompt_s = (np.full(shape, np.nan) for _ in range(4))
    decode_at, decode_s = (np.full((*shape, points), np.nan) for _ in range(2))
    for t, kind in enumerate(kinds):
        for column in range(most[t]):
            decode, prompt = kind.decode_table(column + 1), kind.prompt_table(column + 1)
            kv[t, column] = kind.kv_token_layers[column] / problem.tokens_in_flight
            rate_s[t, column] = problem.tokens_per_request / kind.tokens_per_s[column]
            wait_s[t, column] = WAIT_SHARE * decode.at(1)
            prompt_s[t, column] = prompt.at(problem.mean_prompt_tokens) / problem.mean_output_tokens
            sizes = list(decode.sizes)
            while len(sizes) < points:
                sizes.append(2 * sizes[-1] + 1)
            decode_at[t, column], decode_s[t, column] = sizes, [decode.at(size) for size in sizes]
    # Callers may pass integers, and kernels are compiled for each argument type that they see.
    scalars = links.latency_s, links.token_s, problem.mean_prompt_tokens, problem.mean_output_tokens
    return LayerTables(
        problem.num_layers, np.repeat(np.arange(len(kinds)), [kind.count for kind in kinds]), most, kv, rate_s, wait_s,
        prompt_s, decode_at, decode_s, *map(float, scalars),
    )  # fmt: skip


def new_sweep(num_nodes: int, num_layers: int) -> FlowSweep:
    """Return empty arrays for a sweep."""
    shape = (num_nodes, num_layers)
    return FlowSweep(
        np.ones(num_nodes), np.zeros(num_nodes, np.int64), np.zeros(shape, np.int64), np.zeros(shape),
        np.zeros(num_layers + 1), np.zeros(num_layers, np.int64), np.zeros(num_nodes, np.int64),
    )  # fmt: skip


def copy_of(placement: LayerPlacement) -> LayerPlacement:
    """Return a copy of a placement."""
    return LayerPlacement(placement.first.copy(), placement.held.copy(), placement.tilt.copy())


# --- the value of a placement


@kernel
def share_requests(placement: LayerPlacement, tables: LayerTables, flow_only: bool, sweep: FlowSweep) -> bool:
    """Fill ``sweep``, weighting nodes by tilted KV room (``flow_only``: by rate); False if a layer is missing."""
    first, held, weight = placement.first, placement.held, sweep.weight
    n = first.shape[0]
    sweep.entries[:] = 0
    sweep.arrived[:] = 0.0
    sweep.arrived[0] = 1.0
    sweep.begins[:] = -1
    for i in range(n):
        if held[i] > 0:
            t, k = tables.kind[i], held[i] - 1
            even = 1.0 / tables.rate_s[t, k] if flow_only else tables.kv[t, k] / held[i]
            weight[i] = even * placement.tilt[i]
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
def _enter(i: int, layer: int, share: float, end: int, sweep: FlowSweep) -> None:
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
def rate_of(placement: LayerPlacement, tables: LayerTables, flow_only: bool, sweep: FlowSweep) -> float:
    """Return requests per second, 0 if a layer is missing; ``flow_only``: by measured token rates and cards alone."""
    if not share_requests(placement, tables, flow_only, sweep):
        return 0.0
    first, held, kind = placement.first, placement.held, tables.kind
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


# --- the search


@kernel
def anneal(
    placement: LayerPlacement, best: LayerPlacement, tables: LayerTables, flow_only: bool, sweep: FlowSweep,
    num_moves: int, hot: float, cold: float, wild: bool, seed: int,
) -> float:  # fmt: skip
    """Change ``placement`` by random moves and ``best`` to the best one found; return the rate of ``best``.

    A move that loses a share x of the rate is kept with probability exp(-x / temperature). The temperature falls
    geometrically from ``hot`` to ``cold``. With ``wild``, weights may be far from KV room per layer, which fleets of
    very different nodes need, but which costs time on others.
    """
    np.random.seed(seed)
    trial = LayerPlacement(placement.first.copy(), placement.held.copy(), placement.tilt.copy())
    rate = rate_of(placement, tables, flow_only, sweep)
    best_rate = rate_of(best, tables, flow_only, sweep)
    for step in range(num_moves):
        temperature = hot * (cold / hot) ** (step / num_moves)
        _copy(placement, trial)
        if not _move(trial, tables, wild):
            continue
        found = rate_of(trial, tables, flow_only, sweep)
        if found >= rate or (found > 0.0 and np.random.random() < np.exp(np.log(found / rate) / temperature)):
            rate = found
            _copy(trial, placement)
            if rate > best_rate:
                best_rate = rate
                _copy(placement, best)
    return best_rate


@kernel
def polish(placement: LayerPlacement, tables: LayerTables, flow_only: bool, sweep: FlowSweep, num_rounds: int) -> float:
    """Tilt weights one by one, in ever smaller steps, while that improves the rate; return the rate."""
    rate = rate_of(placement, tables, flow_only, sweep)
    step = 0.5
    for _ in range(num_rounds):
        gained = False
        for i in range(placement.first.shape[0]):
            if placement.held[i] == 0:
                continue
            before = placement.tilt[i]
            for factor in (1 + step, 1 / (1 + step)):
                placement.tilt[i] = before * factor
                found = rate_of(placement, tables, flow_only, sweep)
                if found > rate * (1 + 1e-12):
                    rate, gained = found, True
                    break
                placement.tilt[i] = before
        if not gained:
            step *= 0.5
        if step < 1e-4:
            break
    return rate


@kernel
def _copy(source: LayerPlacement, target: LayerPlacement) -> None:
    for i in range(len(source.first)):
        target.first[i], target.held[i], target.tilt[i] = source.first[i], source.held[i], source.tilt[i]


@kernel
def _move(trial: LayerPlacement, tables: LayerTables, wild: bool) -> bool:
    """Change ``trial`` at random; return False if the move is not possible."""
    held, n = trial.held, trial.first.shape[0]
    i, j = np.random.randint(n), np.random.randint(n)
    by = 1 if np.random.random() < 0.5 else -1
    which = np.random.random()
    if which < 0.22:
        moved = _join(trial, tables, i, j, wild)
    elif which < 0.36:
        moved = _swap(trial, tables, i, j, wild)
    elif which < 0.52:
        moved = _trade(trial, i, j)
    elif which < 0.66:
        moved = _shift_boundary(trial, tables, trial.first[i] + held[i], by)
    elif which < 0.76:
        moved = _stretch(trial, i, by)
    elif which < 0.86:
        most = MOST_WILD_TILT if wild else MOST_TILT
        trial.tilt[i] = min(max(trial.tilt[i] * np.exp(0.4 * np.random.randn()), 1 / most), most)
        moved = held[i] > 0
    elif which < 0.92:
        moved = _split(trial, i)
    elif which < 0.98:
        moved = _merge(trial, i, j)
    else:
        held[i] = 0
        moved = True
    if moved:
        for m in range(n):
            if held[m] < 0 or held[m] > tables.most[tables.kind[m]]:
                return False
            if trial.first[m] < 0 or trial.first[m] + held[m] > tables.num_layers:
                return False
    return moved


@kernel
def _new_tilt(wild: bool) -> float:
    """Draw the tilt of a node in a new place: 1, for a weight by KV room, or an arbitrary one."""
    if wild and np.random.random() < NEW_TILT:
        return float(MOST_WILD_TILT ** np.random.uniform(-1.0, 1.0))
    return 1.0


@kernel
def _join(trial: LayerPlacement, tables: LayerTables, i: int, j: int, wild: bool) -> bool:
    """Give node i the range of node j, or as much of its beginning as node i can hold."""
    trial.first[i] = trial.first[j]
    trial.held[i] = min(trial.held[j], tables.most[tables.kind[i]])
    trial.tilt[i] = _new_tilt(wild)
    return bool(i != j and trial.held[j] > 0)


@kernel
def _swap(trial: LayerPlacement, tables: LayerTables, i: int, j: int, wild: bool) -> bool:
    """Swap the places of two nodes of different types."""
    trial.first[i], trial.first[j] = trial.first[j], trial.first[i]
    trial.held[i], trial.held[j] = trial.held[j], trial.held[i]
    trial.tilt[i], trial.tilt[j] = _new_tilt(wild), _new_tilt(wild)
    return bool(tables.kind[i] != tables.kind[j])


@kernel
def _trade(trial: LayerPlacement, i: int, j: int) -> bool:
    """Move one layer from the range of node i to that of node j, and shift all ranges in between."""
    first, held = trial.first, trial.held
    giver, given = first[i], held[i]
    taker, taken = first[j], held[j]
    if given < 2 or taken == 0 or (giver + given > taker and taker + taken > giver):
        return False  # there is nothing to give or take, or the ranges overlap
    for m in range(first.shape[0]):
        if held[m] == 0:
            continue
        if first[m] == giver and held[m] == given:
            held[m] -= 1
            first[m] += 1 if taker < giver else 0
        elif first[m] == taker and held[m] == taken:
            held[m] += 1
            first[m] -= 1 if taker > giver else 0
        elif giver + given <= first[m] and first[m] + held[m] <= taker:
            first[m] -= 1
        elif taker + taken <= first[m] and first[m] + held[m] <= giver:
            first[m] += 1
    return True


@kernel
def _shift_boundary(trial: LayerPlacement, tables: LayerTables, boundary: int, by: int) -> bool:
    """Shift the end or the beginning of all ranges at a layer by ``by``."""
    first, held = trial.first, trial.held
    for m in range(first.shape[0]):
        if held[m] == 0:
            continue
        if first[m] + held[m] == boundary:
            held[m] += by
        elif first[m] == boundary:
            first[m] += by
            held[m] -= by
        if held[m] == 0:
            return False
    return bool(0 < boundary < tables.num_layers)


@kernel
def _stretch(trial: LayerPlacement, i: int, by: int) -> bool:
    """Shift the beginning or the end of node i alone, or both, by one layer."""
    was_held, which = trial.held[i], np.random.randint(3)
    if which != 0:
        trial.first[i] += by
        trial.held[i] -= by
    if which != 1:
        trial.held[i] += by
    return bool(was_held > 0 and trial.held[i] > 0)


@kernel
def _split(trial: LayerPlacement, i: int) -> bool:
    """Split the nodes of one range into two stages."""
    first, held = trial.first[i], trial.held[i]
    if held < 2:
        return False
    left = np.random.randint(1, held)
    for m in range(trial.first.shape[0]):
        if trial.first[m] == first and trial.held[m] == held:
            if np.random.random() * held < left:
                trial.held[m] = left
            else:
                trial.first[m] += left
                trial.held[m] -= left
    return True


@kernel
def _merge(trial: LayerPlacement, i: int, j: int) -> bool:
    """Make the nodes of two adjacent ranges hold both ranges."""
    first, held = trial.first, trial.held
    begin, left, middle, right = first[i], held[i], first[j], held[j]
    if left == 0 or right == 0 or begin + left != middle:
        return False
    for m in range(first.shape[0]):
        if (first[m] == begin and held[m] == left) or (first[m] == middle and held[m] == right):
            first[m], held[m] = begin, left + right
    return True
