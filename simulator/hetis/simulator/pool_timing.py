"""Attention of a stage with a pool: its own head groups and the workers' in parallel, at their actual places."""

from __future__ import annotations

import numpy as np

from hetis.simulator.timing import StageTiming, fit_of, pair_pieces
from hetis.simulator.values import FloatArray, IntArray
from hetis.solver.cluster import Link
from hetis.solver.dispatch.problem import HeadShape, Primary, Stage
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit, Op

_Affine = list[tuple[float, float]]  # seconds, and seconds per byte


class PoolTiming:
    """Seconds per layer on D devices: the primary, all its ranks together, is the first, the cards are the others."""

    def __init__(self, problem: PlacementProblem, timing: StageTiming, *, cards: int) -> None:
        model, shape = problem.model, timing.shape
        pool = shape.pool
        assert pool is not None
        self.layers, self.tp = timing.layers, shape.tp
        own = pair_pieces(problem.profiles[shape.gpu], model, shape.tp, model.queries_per_group)
        card = pair_pieces(problem.profiles[pool.gpu], model, 1, model.queries_per_group)
        # A group is on one rank, and the ranks are even: each has a share of the primary's pairs and tokens.
        own = [(fixed, per_pair / shape.tp, per_token / shape.tp) for fixed, per_pair, per_token in own]
        most = max(len(own), len(card))
        rows = [_padded(own, most)] + [_padded(card, most)] * cards
        self._call, self._pair, self._token = (np.array([[p[k] for p in row] for row in rows]) for k in range(3))
        self._send = _affine(fit_of(problem.profiles[shape.gpu], Op.TRANSFER, model, shape.tp), pool.link)
        self._receive = _affine(fit_of(problem.profiles[pool.gpu], Op.TRANSFER, model, 1), pool.link)
        self._latency_s = 2.0 * pool.link.latency_s
        self._pair_bytes = model.queries_per_group * model.exchange_bytes_per_head()
        self._token_bytes = model.kv_bytes_per_token_group()
        self._queries = model.queries_per_group
        self._block_tokens = problem.assumptions.block_tokens
        self._heads = HeadShape.of_model(model, block_tokens=self._block_tokens)

    def device_seconds(self, groups: IntArray, tokens: FloatArray) -> FloatArray:
        """Return decode attention per layer, [D], for ``groups`` (request, group) pairs and attended ``tokens``."""
        times: FloatArray = (
            self._call + self._pair * groups[:, None] + self._token * tokens[:, None]
        ).max(axis=1)  # fmt: skip
        return np.where(groups > 0, times, 0.0)

    def attention_s(self, device_s: FloatArray, groups: IntArray) -> float:
        """Return the time per layer: the stage's own share, or the slowest card with its exchange."""
        own_s = float(device_s[0])
        away = int(groups[1:].sum())
        if not away:
            return own_s
        sending = _most(self._send, away * self._pair_bytes)
        slowest = 0.0
        for seconds, pairs in zip(device_s[1:].tolist(), groups[1:].tolist(), strict=True):
            if pairs:
                slowest = max(slowest, seconds + max(sending, _most(self._receive, pairs * self._pair_bytes)))
        return max(own_s, slowest + self._latency_s)

    def late_s(self, chunk: FloatArray, groups: IntArray, layer_s: float) -> float:
        """Return the time that the KV of a chunk adds to a layer that takes ``layer_s``: it is sent in parallel, over
        the same link as the exchange. ``chunk`` are (token, group) pairs per device [D]."""
        return max(0.0, self._ship_s(chunk) + self._exchange_s(groups) - layer_s) if chunk[1:].any() else 0.0

    def _ship_s(self, chunk: FloatArray) -> float:
        total, most = float(chunk[1:].sum()), float(chunk[1:].max())
        return max(_most(self._send, total * self._token_bytes), _most(self._receive, most * self._token_bytes))

    def _exchange_s(self, groups: IntArray) -> float:
        away, most = int(groups[1:].sum()), int(groups[1:].max())
        if not away:
            return 0.0
        sending = _most(self._send, away * self._pair_bytes)
        return max(sending, _most(self._receive, most * self._pair_bytes)) + self._latency_s

    def move_byte_s(self, devices: int) -> FloatArray:
        """Return the seconds per byte of KV that moves in or out, [D]."""
        per_byte = [max(b for _, b in self._send)] + [max(b for _, b in self._receive)] * (devices - 1)
        return np.array(per_byte)

    def stage(self, devices: tuple[str, ...]) -> Stage:
        """Return the same for dispatch: exchanged data is charged to each device and to the primary's link."""
        workers = np.arange(len(devices)) > 0
        receive = max(b for _, b in self._receive), max(c for c, _ in self._receive) + self._latency_s
        send = max(b for _, b in self._send), max(c for c, _ in self._send) + self._latency_s
        scale = np.where(workers, 1.0, float(self.tp))[:, None]  # the solver divides the primary's by its cards
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
    return max(fixed + per_byte * num_bytes for fixed, per_byte in pieces)
