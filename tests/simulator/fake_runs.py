"""Runs without a simulator: a plain queue, for code that only reads runs."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from hetis.simulator.values import Request, Run, SaturatingSource, Series, Settings

PREFILL_S, TOKEN_S = 0.1, 0.01  # time of a prefill, and of each output token after the first


def queue_run(
    requests: Iterable[Request] | SaturatingSource, settings: Settings | None = None, *, seats: int = 8
) -> Run:
    """``seats`` requests at a time, first come, first served, each 0.1 s and 10 ms per further token."""
    settings = settings or Settings()
    free = [(0.0, seat) for seat in range(seats)]
    rows: list[tuple[Request, float, float, float]] = []
    incoming = None if isinstance(requests, SaturatingSource) else iter(requests)
    while True:
        free_s, seat = heapq.heappop(free)
        if incoming is None:
            assert isinstance(requests, SaturatingSource)
            request = requests.next_request(free_s)
        else:
            request = next(incoming, None)
        if request is None:
            break
        admitted_s = max(free_s, request.arrival_s)
        first_s = admitted_s + PREFILL_S
        finished_s = first_s + (request.output_tokens - 1) * TOKEN_S
        rows.append((request, admitted_s, first_s, finished_s))
        heapq.heappush(free, (finished_s, seat))
    end_s = max((row[3] for row in rows), default=0.0)
    return run_of(rows, end_s=end_s, series=_series(rows, settings, end_s))


def run_of(
    rows: list[tuple[Request, float, float, float]],
    *,
    end_s: float,
    series: Series | None = None,
    rejected: int = 0,
) -> Run:
    """A run of requests with the times of their admission, first token and end (NaN: never)."""
    times = np.array([row[1:] for row in rows], dtype=np.float64).reshape(len(rows), 3)
    count = len(rows)
    return Run(
        id=np.array([row[0].id for row in rows], dtype=np.int64),
        arrival_s=np.array([row[0].arrival_s for row in rows], dtype=np.float64),
        admitted_s=times[:, 0],
        first_token_s=times[:, 1],
        finished_s=times[:, 2],
        prompt_tokens=np.array([row[0].prompt_tokens for row in rows], dtype=np.int64),
        output_tokens=np.array([row[0].output_tokens for row in rows], dtype=np.int64),
        replica=np.zeros(count, np.int64),
        preemptions=np.zeros(count, np.int64),
        moved_bytes=np.zeros(count),
        iterations=count,
        num_preemptions=0,
        migrations=0,
        migrated_bytes=0.0,
        kv_transfers=0,
        rejected=rejected,
        series=series,
        end_s=end_s,
    )


def _series(rows: list[tuple[Request, float, float, float]], settings: Settings, end_s: float) -> Series | None:
    if settings.sample_every_s is None:
        return None
    times = np.arange(1, int(end_s / settings.sample_every_s) + 2) * settings.sample_every_s
    running = np.array([sum(row[1] <= time_s < row[3] for row in rows) for time_s in times]) / 8
    return Series(
        devices=("a100/0", "a100/1"),
        times_s=times,
        kv_used_fraction=np.stack([running, running / 2], axis=1),
        busy_fraction=np.stack([running, running], axis=1),
    )
