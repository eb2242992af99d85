"""The problem as arrays for kernels and bound: one row per node type, one column per number of layers held."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis.solver.layers.problem import WAIT_SHARE, LayersProblem, TimeTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class LayerTables(NamedTuple):
    """Arrays over T node types, K layers held (column k - 1), Q points of a time table (padded with its last slope).

    Seconds of one layer: ``wait_s`` for any batch, ``prompt_s`` of a prompt per output token, ``decode_s`` of
    ``decode_at`` sequences. ``rate_s`` is the seconds of a request by the measured tokens per second.
    """

    num_layers: int
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


def tabulate(problem: LayersProblem) -> LayerTables:
    """Return everything that the search needs to know of a problem."""
    kinds = problem.node_types
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
            decode_at[t, column], decode_s[t, column] = _padded(decode, points)
    return LayerTables(
        num_layers=problem.num_layers,
        most=most,
        kv=kv,
        rate_s=rate_s,
        wait_s=wait_s,
        prompt_s=prompt_s,
        decode_at=decode_at,
        decode_s=decode_s,
        # Callers may pass integers, and kernels are compiled for each type that they see.
        latency_s=float(problem.links.latency_s),
        card_s=float(problem.links.token_s),
        prompt_tokens=float(problem.mean_prompt_tokens),
        output_tokens=float(problem.mean_output_tokens),
    )


def _padded(table: TimeTable, points: int) -> tuple[FloatArray, FloatArray]:
    """Return sizes and seconds of a table, extended with its last slope to ``points`` points."""
    sizes = list(table.sizes)
    while len(sizes) < points:
        sizes.append(2 * sizes[-1] + 1)
    return np.array(sizes), np.array([table.at(size) for size in sizes])
