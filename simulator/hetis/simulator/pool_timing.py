"""Attention of a stage and its workers: the load of each device, and the time that it takes with its exchange."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import numpy as np

from hetis.simulator.kv_memory import KvGrowth
from hetis.simulator.timing import StageTiming, fit_of, pair_pieces
from hetis.simulator.values import FloatArray
from hetis.solver.cluster import Link
from hetis.solver.dispatch.dispatch_problem import HeadShape, Primary, Stage
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit, Op


class PoolLoad:
    """Load of one micro-batch's decoding requests on D devices: (request, head group) pairs and attended tokens.

    These are lists, as are the other per-device figures that every iteration reads: a stage has few devices, and numpy
    arrays of so few numbers are slower.
    """

    __slots__ = ("groups", "growing", "looked", "tokens")

    def __init__(self, devices: int) -> None:
        self.groups = [0] * devices
        self.growing = [0] * devices  # pairs of requests within the sliding window
        self.tokens = [0.0] * devices
        self.looked = 0  # step of the last check by re-dispatch

    def add(self, groups: Sequence[int], attended: float, *, grows: bool) -> None:
        """Add a request's head groups on each device; negative numbers remove them."""
        for i, more in enumerate(groups):
            self.groups[i] += more
            self.tokens[i] = self.tokens[i] + more * attended if self.groups[i] else 0.0  # no residue of rounding
            if grows:
                self.growing[i] += more

    def stop_growing(self, groups: Sequence[int]) -> None:
        """Note that a request has reached the sliding window."""
        for i, fewer in enumerate(groups):
            self.growing[i] -= fewer

    def grow(self, growth: KvGrowth) -> None:
        """Lengthen the context of every request by one token."""
        first, late, tokens = growth.first_slope, growth.slope, self.tokens
        for i, growing in enumerate(self.growing):
            tokens[i] += first * growing + late * (self.groups[i] - growing)


_Affine = list[tuple[float, float]]  # (seconds, seconds per byte) of each piece


class PoolTiming:
    """Seconds per layer on D devices: the first is the primary, all its ranks together; the others are the cards."""

    def __init__(self, problem: PlacementProblem, timing: StageTiming, *, cards: int) -> None:
        model, shape = problem.model, timing.shape
        pool = shape.pool
        assert pool is not None
        self.layers, self.tp, self._mixed_factor = timing.layers, shape.tp, timing.mixed_factor
        context = timing.cost.moments.resident_context
        own = pair_pieces(problem.profiles[shape.gpu], model, shape.tp, model.queries_per_group, context)
        card = pair_pieces(problem.profiles[pool.gpu], model, 1, model.queries_per_group, context)
        # A group is on one rank, and the load of the ranks is even: each has a share of the primary's pairs and tokens.
        own = [(fixed, per_pair / shape.tp, per_token / shape.tp) for fixed, per_pair, per_token in own]
        most = max(len(own), len(card))
        rows = [_padded(own, most)] + [_padded(card, most)] * cards
        self._call, self._pair, self._token = (np.array([[p[k] for p in row] for row in rows]) for k in range(3))
        self._pieces = rows  # per device: seconds, seconds per pair and per token of each piece
        self._send = _affine(fit_of(problem.profiles[shape.gpu], Op.TRANSFER, model, shape.tp), pool.link)
        self._receive = _affine(fit_of(problem.profiles[pool.gpu], Op.TRANSFER, model, 1), pool.link)
        self._latency_s = 2.0 * pool.link.latency_s + timing.plugin.exchange_s
        pair_bytes = model.queries_per_group * model.exchange_bytes_per_head()
        # Seconds in which the primary, and a card, exchange the heads of so many pairs
        self._sent_s = cache(partial(_pairs_s, self._send, pair_bytes))
        self._received_s = cache(partial(_pairs_s, self._receive, pair_bytes))
        self._token_bytes = model.kv_bytes_per_token_group()
        self._queries = model.queries_per_group
        self._block_tokens = problem.assumptions.block_tokens
        self._heads = HeadShape.of_model(model, block_tokens=self._block_tokens)

    def device_seconds(
        self, groups: Sequence[int], tokens: Sequence[float], *, beside_chunk: bool = False
    ) -> list[float]:
        """Return decode attention per layer, [D], for ``groups`` (request, group) pairs and attended ``tokens``.

        Only the primary computes it beside a chunk.
        """
        device_s = []
        for pieces, pairs, attended in zip(self._pieces, groups, tokens, strict=True):
            most = 0.0
            if pairs:
                for call, per_pair, per_token in pieces:
                    piece = call + per_pair * pairs + per_token * attended
                    if piece > most:
                        most = piece
            device_s.append(most)
        if beside_chunk:
            device_s[0] *= self._mixed_factor
        return device_s

    def attention_s(self, device_s: Sequence[float], groups: Sequence[int]) -> float:
        """Return the attention time per layer: the stage's own, or that of the slowest card including its exchange."""
        own_s = device_s[0]
        away = sum(groups) - groups[0]
        if not away:
            return own_s
        sending, slowest = self._sent_s(away), 0.0
        for i in range(1, len(groups)):
            if pairs := groups[i]:
                receiving = self._received_s(pairs)
                seconds = device_s[i] + (receiving if receiving > sending else sending)
                if seconds > slowest:
                    slowest = seconds
        return max(own_s, slowest + self._latency_s)

    def late_s(self, chunk: Sequence[int], groups: Sequence[int], layer_s: float) -> float:
        """Return the time that sending a chunk's KV adds to a layer that takes ``layer_s``.

        The KV is sent in parallel with the layer, over the same link as the exchange. ``chunk`` is the number of
        (token, group) pairs on each device, [D].
        """
        return max(0.0, self._ship_s(chunk[1:]) + self._exchange_s(groups[1:]) - layer_s) if any(chunk[1:]) else 0.0

    def _ship_s(self, chunk: Sequence[int]) -> float:
        total, most = sum(chunk), max(chunk)
        return max(_most(self._send, total * self._token_bytes), _most(self._receive, most * self._token_bytes))

    def _exchange_s(self, away: Sequence[int]) -> float:
        if not any(away):
            return 0.0
        return max(self._sent_s(sum(away)), self._received_s(max(away))) + self._latency_s

    def move_byte_s(self, devices: int) -> FloatArray:
        """Return the seconds per byte of KV that moves in or out, [D]."""
        per_byte = [max(b for _, b in self._send)] + [max(b for _, b in self._receive)] * (devices - 1)
        return np.array(per_byte)

    def stage(self, devices: tuple[str, ...]) -> Stage:
        """Return the stage as dispatch sees it: exchanged data is charged to each device and to the primary's link."""
        workers = np.arange(len(devices)) > 0
        receive = max(b for _, b in self._receive), max(c for c, _ in self._receive) + self._latency_s
        send = max(b for _, b in self._send), max(c for c, _ in self._send) + self._latency_s
        scale = np.where(workers, 1.0, float(self.tp))[:, None]  # the solver divides the primary's load by its cards
        return Stage(
            heads=self._heads,
            devices=devices,
            head_s=self._pair * scale / self._queries,
            kv_byte_s=self._token * scale / self._token_bytes,
            call_s=self._call,
            transfer_byte_s=np.where(workers, receive[0], 0.0),
            transfer_s=np.where(workers, receive[1], 0.0),
            primary=Primary(device=0, tp=self.tp, nic_byte_s=send[0], nic_s=send[1]),
        )


def _padded(pieces: list[tuple[float, float, float]], most: int) -> list[tuple[float, float, float]]:
    return pieces + [pieces[-1]] * (most - len(pieces))


def _affine(fit: Fit, link: Link) -> _Affine:
    return [(p.fixed_s, p.byte_s + p.wire / link.bytes_per_s) for p in fit.pieces]


def _most(pieces: _Affine, num_bytes: float) -> float:
    return max([fixed + per_byte * num_bytes for fixed, per_byte in pieces])


def _pairs_s(pieces: _Affine, pair_bytes: float, pairs: int) -> float:
    return _most(pieces, pairs * pair_bytes)
