"""The order in which a replica's micro-batches pass through the copies of its stages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hetis.simulator.decode_runs import FEWEST, DecodeRun, next_iterations
from hetis.simulator.events import Events
from hetis.simulator.micro_batch import MicroBatch
from hetis.simulator.timing import StageTiming
from hetis.simulator.values import RequestLog

Done = Callable[[float, MicroBatch], None]


class Discipline:
    """The order in which a replica's micro-batches pass through its stages.

    Attributes:
        keeps_order: whether iterations leave every stage in the order in which they were started, so that chunks of a
            prompt may follow each other through the pipeline.
    """

    keeps_order = False

    def __init__(self, events: Events, log: RequestLog, done: Done) -> None:
        self._events, self._log, self._done = events, log, done

    def start(self, now_s: float, batch: MicroBatch) -> None:
        """Send an iteration, given by the batch's ``contents``, to the first stage."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """Bring the state of iterations that were computed ahead to the current time, before it changes or is read."""


class Apart(Discipline):
    """The discipline that keeps micro-batches separate; a copy serves them in order of arrival.

    The time when a copy is free is therefore its only state, and a visit to a stage is a single event. Where every
    stage has one copy, iterations arrive everywhere in the order in which they start, so that the whole pass is one
    event, if nothing looks at copies (``passes_at_once``) or shares their cards in the meantime. Nobody asks then how
    busy they were. Iterations of a replica's only micro-batch (``is_alone``) that just decode are computed together
    (`decode_runs.py`).
    """

    keeps_order = True

    def __init__(self, events: Events, log: RequestLog, done: Done, *, passes_at_once: bool, is_alone: bool) -> None:
        super().__init__(events, log, done)
        self._passes_at_once, self._runs_ahead = passes_at_once, passes_at_once and is_alone
        self._run: tuple[DecodeRun, MicroBatch, int] | None = None  # and the event at its end
        self._pause = 0  # iterations before the next run, since the last one was short

    def start(self, now_s: float, batch: MicroBatch) -> None:
        if self._runs_ahead and batch.only_decodes and not batch.pools:
            if self._pause:
                self._pause -= 1
            elif (run := next_iterations(now_s, batch)) is not None:
                self._run = run, batch, self._events.at(float(run.ends_s[-1, -1]), self._end_run)
                return
            else:
                self._pause = FEWEST
        decoding, attended, tokens, pairs, read, rows = batch.contents
        batch.seconds = seconds = list[float]()
        before: StageTiming | None = None
        for copy in batch.copies:
            if copy.timing is before:  # as equal stages have
                seconds.append(seconds[-1])
            else:
                before = copy.timing
                seconds.append(before.seconds(decoding, attended, tokens, pairs, read, rows))
        if batch.pools:
            for stage, load in batch.loads.items():
                pool = batch.copies[stage].pool
                assert pool is not None
                beside_s = batch.copies[stage].timing.beside_layers_s(decoding + tokens, rows)
                batch.seconds[stage] += pool.seconds([load], [batch], batch.seconds[stage] - beside_s)
        if self._passes_at_once:
            end_s = now_s
            for copy, stage_s in zip(batch.copies, batch.seconds, strict=True):
                end_s = (copy.free_s if copy.free_s > end_s else end_s) + stage_s
                copy.free_s = end_s
            self._events.at(end_s, self._done, batch)
        else:
            self._arrive(now_s, batch, 0)

    def interrupt(self) -> None:
        if self._run is None:
            return
        (run, batch, event), self._run = self._run, None
        self._events.cancel(event)
        current = min(int(np.searchsorted(run.ends_s[:, -1], self._events.now_s)), len(run.ends_s) - 1)
        self._advance(run, batch, current)
        self._events.at(float(run.ends_s[current, -1]), self._done, batch)

    def _end_run(self, now_s: float) -> None:
        assert self._run is not None, "its event was not cancelled"
        (run, batch, _), self._run = self._run, None
        self._advance(run, batch, len(run.ends_s) - 1)
        self._done(now_s, batch)

    def _advance(self, run: DecodeRun, batch: MicroBatch, current: int) -> None:
        """Bring the state to an iteration of a run, which is then under way."""
        self._log.iterations += current
        run.advance(batch, current)
        if current < FEWEST:
            self._pause = 4 * FEWEST

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
            end_s = copy.pool.after_others(start_s, end_s, [batch.loads[stage]])
            seconds = end_s - start_s
        copy.free_s = end_s
        copy.busy_s += seconds
        self._events.at(end_s, self._arrive, batch, stage + 1)


class Lockstep(Discipline):
    """The discipline of copies that share experts: those with work iterate together, all as long as the slowest."""

    def __init__(self, events: Events, log: RequestLog, done: Done) -> None:
        super().__init__(events, log, done)
        self._waiting, self._serving = list[MicroBatch](), list[MicroBatch]()

    def start(self, now_s: float, batch: MicroBatch) -> None:
        self._waiting.append(batch)
        self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        if self._waiting and not self._serving:
            self._serving = self._waiting
            self._events.at(now_s, self._serve)  # in a separate event, to include others that start at the same time

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
        self._events.at(now_s + seconds, self._leave)

    def _leave(self, now_s: float) -> None:
        served, self._serving = self._serving, []
        for batch in served:
            if batch.alive:
                self._done(now_s, batch)
        self._begin(now_s)  # for micro-batches that have arrived meanwhile, if none of the served ones goes on
