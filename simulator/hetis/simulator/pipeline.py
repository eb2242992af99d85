"""The order in which micro-batches use the copies of stages: separately, all waiting ones at once, or in step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hetis.simulator.events import Events
from hetis.simulator.micro_batch import MicroBatch, SimulatedStageCopy
from hetis.simulator.request_log import RequestLog
from hetis.simulator.values import TraceEvent

Done = Callable[[float, MicroBatch], None]


class Discipline(Protocol):
    """Sends the micro-batches of a replica through its stages."""

    def start(self, now_s: float, batch: MicroBatch) -> None:
        """Send an iteration into the first stage, with its ``contents``."""


class Apart:
    """The discipline that keeps micro-batches separate; a copy serves them in the order in which they arrive.

    So a copy's free time is the only state, and a visit to a stage is one event.
    """

    def __init__(self, events: Events, log: RequestLog, done: Done, *, traced: bool) -> None:
        self._events, self._log, self._done, self._traced = events, log, done, traced

    def start(self, now_s: float, batch: MicroBatch) -> None:
        decoding, attended, tokens, pairs, read, rows = batch.contents
        batch.seconds = [
            copy.timing.seconds(decoding, attended, tokens, pairs, read, rows) for copy in batch.copies
        ]  # fmt: skip
        if batch.pools:
            for stage, load in batch.loads.items():
                pool = batch.copies[stage].pool
                assert pool is not None
                beside_s = batch.copies[stage].timing.beside_layers_s(decoding + tokens, rows)
                batch.seconds[stage] += pool.seconds([load], [batch], batch.seconds[stage] - beside_s)
        self._arrive(now_s, batch, 0)

    def _arrive(self, now_s: float, batch: MicroBatch, stage: int) -> None:
        if not batch.alive:
            return
        copies = batch.copies
        if stage == len(copies):
            self._done(now_s, batch)
            return
        copy = copies[stage]
        start_s = copy.free_s if copy.free_s > now_s else now_s
        seconds = batch.seconds[stage]
        end_s = start_s + seconds
        if copy.pool is not None and copy.pool.is_shared:
            end_s = copy.pool.after_others(start_s, end_s, batch.loads[stage])
            seconds = end_s - start_s
        copy.free_s = end_s
        copy.busy_s += seconds
        if self._traced:
            self._log.trace_events.append(_bar(copy, [batch], start_s, seconds))
        self._events.at(end_s, self._arrive, batch, stage + 1)


class Greedy:
    """The discipline in which a copy takes all waiting micro-batches at once; they then leave and stay together."""

    def __init__(self, events: Events, log: RequestLog, done: Done, *, traced: bool) -> None:
        self._events, self._log, self._done, self._traced = events, log, done, traced

    def start(self, now_s: float, batch: MicroBatch) -> None:
        self._arrive(now_s, batch, 0)

    def _arrive(self, now_s: float, batch: MicroBatch, stage: int) -> None:
        copy = batch.copies[stage]
        copy.waiting.append(batch)
        if not copy.serving:
            # Others that arrive at the same time have to be included.
            copy.serving = copy.waiting
            self._events.at(now_s, self._serve, copy)

    def _serve(self, now_s: float, copy: SimulatedStageCopy) -> None:
        copy.serving, copy.waiting = [batch for batch in copy.waiting if batch.alive], []
        if not copy.serving:
            return
        parts = [batch.contents for batch in copy.serving]
        together = parts[0] if len(parts) == 1 else tuple(map(sum, zip(*parts, strict=True)))
        seconds = copy.timing.seconds(*together)
        if copy.pool is not None:
            decoding, _, tokens, _, _, rows = together
            layers_s = seconds - copy.timing.beside_layers_s(decoding + tokens, rows)
            seconds += copy.pool.seconds([batch.loads[copy.stage] for batch in copy.serving], copy.serving, layers_s)
        copy.free_s = now_s + seconds
        copy.busy_s += seconds
        if self._traced:
            self._log.trace_events.append(_bar(copy, copy.serving, now_s, seconds))
        self._events.at(copy.free_s, self._leave, copy)

    def _leave(self, now_s: float, copy: SimulatedStageCopy) -> None:
        served, copy.serving = copy.serving, []
        if copy.waiting:
            copy.serving = copy.waiting
            self._events.at(now_s, self._serve, copy)
        for batch in served:
            if not batch.alive:
                continue
            if copy.stage + 1 < len(batch.copies):
                self._arrive(now_s, batch, copy.stage + 1)
            else:
                self._done(now_s, batch)


class Lockstep:
    """The discipline of copies that share their experts: those with work iterate together, as long as the longest."""

    def __init__(self, events: Events, log: RequestLog, done: Done, *, traced: bool) -> None:
        self._events, self._log, self._done, self._traced = events, log, done, traced
        self._waiting, self._serving = list[MicroBatch](), list[MicroBatch]()

    def start(self, now_s: float, batch: MicroBatch) -> None:
        self._waiting.append(batch)
        self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        if self._waiting and not self._serving:
            self._serving = self._waiting
            self._events.at(now_s, self._serve)  # others that start at the same time have to be included

    def _serve(self, now_s: float) -> None:
        self._serving, self._waiting = [batch for batch in self._waiting if batch.alive], []
        if not self._serving:
            return
        timings = [batch.copies[0].timing for batch in self._serving]
        tokens = [timing.tokens(batch.contents) for timing, batch in zip(timings, self._serving, strict=True)]
        together = sum(tokens)
        seconds = max(
            timing.seconds(*batch.contents, together - own)
            for timing, batch, own in zip(timings, self._serving, tokens, strict=True)
        )
        for batch in self._serving:
            copy = batch.copies[0]
            copy.free_s = now_s + seconds
            copy.busy_s += seconds
            if self._traced:
                self._log.trace_events.append(_bar(copy, [batch], now_s, seconds))
        self._events.at(now_s + seconds, self._leave)

    def _leave(self, now_s: float) -> None:
        served, self._serving = self._serving, []
        for batch in served:
            if batch.alive:
                self._done(now_s, batch)
        self._begin(now_s)  # whoever has come meanwhile, should none of these go on


def _bar(copy: SimulatedStageCopy, batches: list[MicroBatch], start_s: float, seconds: float) -> TraceEvent:
    decoding = sum(batch.contents[0] for batch in batches)
    chunk = sum(batch.contents[2] for batch in batches)
    names = "+".join(str(batch.index) for batch in batches)
    arguments = (("decoding", float(decoding)), ("chunk_tokens", float(chunk)))
    return TraceEvent(copy.track, f"micro-batch {names}", start_s, seconds, arguments)
