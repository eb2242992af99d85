"""Has the prompts of an engine computed by others, and puts their KV where the heads live.

The last token of a prompt is left to the engine itself: it attends to the KV that came, and its output is sampled here
as every other token is. So nothing but KV comes from elsewhere, and a request that has to begin anew, after a lost
device or because it made room, has prompt and output so far computed in the same way.

A peer that is lost costs what it had not sent: the request is seated again, and asks another peer. Where there is none
the engine computes the prompt itself, as it would without peers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.request import Request
from hetis.runtime.handover.kv import write_kv
from hetis.runtime.handover.peer import Arrival, Arrivals, PrefillPeer

_WAIT_S = 0.005  # what the engine's thread is also asked by others
_LEAST_TOKENS = 2  # of a prompt: a shorter one leaves nothing to be computed elsewhere
_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class PromptCounts:
    """Since the start: prompts whose KV came, its bytes, prompts that were computed here, and peers' failures."""

    received: int = 0
    received_bytes: int = 0
    computed_here: int = 0
    failed: int = 0


@dataclass(slots=True, kw_only=True)
class _Job:
    """KV of the first ``tokens`` positions of a request."""

    request: Request
    incarnation: int
    peer: PrefillPeer
    tokens: int

    def is_wanted(self, engine: Engine) -> bool:
        running = engine.running.get(self.request.number)
        return running is self.request and self.request.incarnation == self.incarnation


class RemotePrompts:
    """A `PromptSource`: peers compute what ``engine`` decodes. Its methods are called by the engine's thread."""

    def __init__(
        self, engine: Engine, peers: Sequence[PrefillPeer], arrivals: Arrivals, *, bytes_per_step: int = 64 << 20
    ) -> None:
        """``bytes_per_step``: KV that is put in place between two steps, so that decoding is not held up for long."""
        self.counts = PromptCounts()
        self._engine, self._peers, self._arrivals = engine, tuple(peers), arrivals
        self._bytes_per_step = bytes_per_step
        self._jobs: dict[int, _Job] = {}
        self._numbers = count(1)
        self._refused: dict[int, set[PrefillPeer]] = {}  # by request: who is not asked for it again
        engine.elsewhere = self
        engine.between_steps.append(self.advance)

    @property
    def num_up(self) -> int:
        """Peers that are reached."""
        return sum(peer.is_up for peer in self._peers)

    def ask(self, request: Request) -> bool:
        tokens = request.tokens(0, request.num_tokens - 1)
        if len(tokens) + 1 >= _LEAST_TOKENS:
            refused = self._refused.get(request.number, ())
            peers = [peer for peer in self._peers if peer not in refused]
            for peer in sorted(peers, key=lambda peer: peer.num_jobs):
                number = next(self._numbers)
                if peer.ask(number, tokens):
                    job = _Job(request=request, incarnation=request.incarnation, peer=peer, tokens=len(tokens))
                    self._jobs[number] = job
                    return True
        self.counts.computed_here += 1
        return False

    def wait(self) -> None:
        self._arrivals.wait(_WAIT_S)

    def advance(self) -> None:
        """Between two steps: puts in place what has come, gives up what nobody wants."""
        for number in [number for number, job in self._jobs.items() if not job.is_wanted(self._engine)]:
            self._jobs.pop(number).peer.cancel(number)
        if self._refused:
            there = {*self._engine.running, *(request.number for request in self._engine.waiting)}
            self._refused = {number: peers for number, peers in self._refused.items() if number in there}
        failed, left = list[_Job](), self._bytes_per_step
        while left > 0 and (arrival := self._arrivals.take()) is not None:
            job = self._jobs.get(arrival.job)
            if job is None:
                continue  # of a request that has left
            if arrival.piece is None:
                del self._jobs[arrival.job]
                self._note_failed(job, arrival)
                failed.append(job)
            else:
                left -= arrival.piece.num_bytes
                self._put(job, arrival)
        for job in sorted(failed, key=lambda job: job.request.number, reverse=True):
            self._engine.preempt(job.request.number)  # waits first of all, and asks again

    def _put(self, job: _Job, arrival: Arrival) -> None:
        piece, request = arrival.piece, job.request
        assert piece is not None, "it is no failure"
        write_kv(self._engine, request, piece.first, piece.k, piece.v)  # the peer saw to it that nothing is left out
        self.counts.received_bytes += piece.num_bytes
        request.computed = piece.last
        if piece.last == job.tokens:
            del self._jobs[arrival.job]
            self.counts.received += 1
            request.prefill_tokens, request.awaits_kv = job.tokens, False

    def _note_failed(self, job: _Job, arrival: Arrival) -> None:
        self.counts.failed += 1
        if arrival.is_final:
            self._refused.setdefault(job.request.number, set()).add(job.peer)
        _log.info("request %d: its prompt is not computed at %s: %s", job.request.number, job.peer.name, arrival.why)
