"""The answer of a dispatch: the placement, its quality, how it was found, and which requests must wait and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from hetis.solver.dispatch.problem import FloatArray, IntArray


class Path(StrEnum):
    """The way in which an answer was found.

    ``chain``: the relaxation was solved exactly as a chain by comparative advantage, every device on one affine piece.
    ``mixed``: two rows at once bind some devices (affine pieces, memory, the primary's network card). The chain was
    solved on mixtures of the two, and is optimal up to the requested tolerance.
    ``lp``: HiGHS solved the relaxation.
    ``milp``: HiGHS searched whole head groups (`solve_exactly`).
    """

    CHAIN = "chain"
    MIXED = "mixed"
    LP = "lp"
    MILP = "milp"


class Resource(StrEnum):
    """The resource that an unplaced request lacks.

    ``kv_blocks``: all devices together have too few free KV blocks.
    ``whole_groups``: they have enough, but in pieces smaller than a head group of the request (on the primary, smaller
    than the groups it takes at once).
    """

    KV_BLOCKS = "kv_blocks"
    WHOLE_GROUPS = "whole_groups"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplaced:
    """A request that has to wait.

    Attributes:
        request: its index in the problem.
        id: its name.
        resource: what it lacks after the requests admitted before it.
        missing: KV blocks per layer for ``kv_blocks``, head groups without room for ``whole_groups``.
        proved: no placement holds it in addition to those admitted before it. This is always true for ``kv_blocks``.
            The fast path may overlook a packing of whole groups and then proves nothing; `solve_exactly` does, given
            the time.
    """

    request: int
    id: str
    resource: Resource
    missing: int
    proved: bool

    def __str__(self) -> str:
        if self.resource is Resource.KV_BLOCKS:
            return f"request {self.id}: {self.missing} KV blocks per layer are missing"
        if not self.proved:
            return (
                f"request {self.id}: no room was found for {self.missing} head groups; that there is none is unproved"
            )
        return f"request {self.id}: {self.missing} head groups fit on no device; the free blocks are too scattered"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShadowPrices:
    """Multipliers that prove the bound; `hetis.solver.dispatch.certificate` recomputes it from them.

    Attributes:
        piece: weight of every affine piece of every device, shape [D, K], >= 0. Those of the devices that are in use
            at the bound, and ``nic``, sum to 1 unless the running load alone is the bound (then all are 0).
        block_s: seconds of makespan that one more free KV block on the device saves, shape [D].
        nic: weight of the primary's network card.
        request_s: seconds of makespan that one more head group of the request would cost, shape [J].
    """

    piece: FloatArray
    block_s: FloatArray
    nic: float
    request_s: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchPlan:
    """A placement in whole head groups.

    Attributes:
        groups: head groups of request j on device i, shape [J, D]; the rows of unplaced requests are 0.
        makespan_s: seconds per layer of one decode iteration on the slowest device (or network card), including
            running requests.
        bound_s: no placement of the same requests is faster, as ``prices`` prove.
        relaxed_s: makespan of the best fractional placement found; equal to ``bound_s`` up to rounding on the paths
            ``chain`` and ``lp``.
        path: how it was found.
        unplaced: requests left out, in order.
        prices: the multipliers behind the bound.
    """

    groups: IntArray
    makespan_s: float
    bound_s: float
    relaxed_s: float
    path: Path
    unplaced: tuple[Unplaced, ...]
    prices: ShadowPrices

    @property
    def gap(self) -> float:
        """Return how far the makespan may be above the best, ``makespan_s / bound_s - 1``, or 0 if nothing runs."""
        if self.makespan_s <= self.bound_s:
            return 0.0
        return self.makespan_s / self.bound_s - 1.0 if self.bound_s > 0 else np.inf
