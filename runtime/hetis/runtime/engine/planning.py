"""What the next step computes: a token of everyone who decodes, and chunks of the prompts that came first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from hetis.runtime.engine.request import Request
from hetis.runtime.engine.step import Chunk, Step


def plan_steps(
    requests: Sequence[Request],
    *,
    epoch: int,
    number: int,
    chunk_tokens: int,
    stages: Mapping[int, int],
    may_prefill: Callable[[Request], bool],
) -> tuple[list[Step], list[Request]]:
    """The step of running requests on each stage, and those whose tokens come out of it, in the order of its outputs.

    Prompts share ``chunk_tokens`` in the order of the requests, so that the first is through first. ``stages`` has the
    number of heads of each stage by its number, in the order of the pipeline. ``may_prefill``: whether the primaries
    have room for a prompt.
    """
    decoding = [request for request in requests if not request.is_prefilling]
    tokens = [request.token(request.computed) for request in decoding]
    positions = [request.computed for request in decoding]
    wanted, outputs = list(decoding), list(range(len(decoding)))
    chunks: list[tuple[Request, Chunk]] = []
    left = chunk_tokens
    for request in requests:
        if not request.is_prefilling or not left or not may_prefill(request):
            continue
        first = request.computed
        count = min(request.prefill_tokens - first, left)
        left -= count
        chunk = Chunk(
            request=request.number,
            incarnation=request.incarnation,
            first=first,
            count=count,
            total=request.prefill_tokens,
            heads=(),
        )
        chunks.append((request, chunk))
        tokens += request.tokens(first, first + count)
        positions += range(first, first + count)
        if chunk.is_last:
            wanted.append(request)
            outputs.append(len(tokens) - 1)
    steps = [
        Step(
            epoch=epoch,
            number=number,
            tokens=np.array(tokens, np.int64),
            positions=np.array(positions, np.int64),
            requests=np.array([request.number for request in decoding], np.int64),
            incarnations=np.array([request.incarnation for request in decoding], np.int64),
            heads=np.array([request.heads[stage] for request in decoding], np.int64).reshape(-1, num_heads),
            chunks=tuple(replace(chunk, heads=request.heads[stage]) for request, chunk in chunks),
            outputs=np.array(outputs, np.int64),
            is_greedy=all(request.params.is_greedy for request in wanted),
        )
        for stage, num_heads in stages.items()
    ]
    return steps, wanted
