"""The record of every request while the simulation runs: a column per quantity, an entry per request."""

from __future__ import annotations

import math

import numpy as np

from hetis.simulator.values import Request, Run, Series, TraceEvent

NEVER = math.nan


class RequestLog:
    """Requests by number, in their order of arrival; the attributes up to ``moved_bytes`` are those of `Run`.

    Attributes:
        produced: output tokens so far, as of the last time the request started to decode.
        target: tokens to prefill: the prompt, and the tokens produced before it was last evicted.
        filled: tokens of them that are prefilled.
        prefix: tokens of the prompt in the prefix cache, from which a prefill starts, also after an eviction.
    """

    __slots__ = (
        "admitted_s", "arrival_s", "filled", "finished_s", "first_token_s", "id", "iterations", "kv_transfers",
        "migrated_bytes", "migrations", "moved_bytes", "num_preemptions", "output", "preemptions", "prefilled",
        "prefix", "produced", "prompt", "rejected", "replica", "target", "trace_events",
    )  # fmt: skip

    def __init__(self) -> None:
        self.id: list[int] = []
        self.arrival_s: list[float] = []
        self.admitted_s: list[float] = []
        self.first_token_s: list[float] = []
        self.finished_s: list[float] = []
        self.prompt: list[int] = []
        self.output: list[int] = []
        self.replica: list[int] = []
        self.preemptions: list[int] = []
        self.moved_bytes: list[float] = []
        self.produced: list[int] = []
        self.target: list[int] = []
        self.filled: list[int] = []
        self.prefix: list[int] = []
        self.iterations = self.num_preemptions = self.migrations = self.kv_transfers = self.rejected = 0
        self.prefilled = 0
        self.migrated_bytes = 0.0
        self.trace_events: list[TraceEvent] = []

    def arrive(self, request: Request, now_s: float) -> int:
        """Add a request; return its number."""
        self.id.append(request.id)
        self.arrival_s.append(now_s)
        for times in (self.admitted_s, self.first_token_s, self.finished_s):
            times.append(NEVER)
        self.prompt.append(request.prompt_tokens)
        self.output.append(request.output_tokens)
        self.replica.append(-1)
        self.preemptions.append(0)
        self.moved_bytes.append(0.0)
        self.produced.append(0)
        self.target.append(request.prompt_tokens)
        self.filled.append(0)
        self.prefix.append(request.prefix_tokens)
        return len(self.id) - 1

    def reject(self, request: int) -> None:
        """Reject a request that no replica can ever hold."""
        self.rejected += 1
        self.replica[request] = -1

    def evict(self, request: int) -> None:
        """Record the loss of its KV: all its tokens have to be prefilled again."""
        self.target[request] = self.prompt[request] + self.produced[request]
        self.filled[request] = 0
        self.preemptions[request] += 1
        self.num_preemptions += 1

    def begun(self, request: int) -> int:
        """Return how many tokens of its target need no more computing: those that are prefilled or were cached."""
        return self.filled[request] or self.prefix[request]

    def run(self, end_s: float, series: Series | None) -> Run:
        """Return all of it as a value."""
        return Run(
            id=np.array(self.id, np.int64),
            arrival_s=np.array(self.arrival_s, np.float64),
            admitted_s=np.array(self.admitted_s, np.float64),
            first_token_s=np.array(self.first_token_s, np.float64),
            finished_s=np.array(self.finished_s, np.float64),
            prompt_tokens=np.array(self.prompt, np.int64),
            output_tokens=np.array(self.output, np.int64),
            replica=np.array(self.replica, np.int64),
            preemptions=np.array(self.preemptions, np.int64),
            moved_bytes=np.array(self.moved_bytes, np.float64),
            iterations=self.iterations,
            num_preemptions=self.num_preemptions,
            migrations=self.migrations,
            migrated_bytes=self.migrated_bytes,
            kv_transfers=self.kv_transfers,
            rejected=self.rejected,
            prefilled_tokens=self.prefilled,
            generated_tokens=sum(self.produced),
            series=series,
            trace_events=tuple(self.trace_events),
            end_s=end_s,
        )
