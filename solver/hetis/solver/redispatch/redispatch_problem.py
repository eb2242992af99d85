"""The re-dispatch problem: the running load of a stage, and the cost of moving KV between its devices; and its answer.

    min  z  +  sum_j lambda_j (seconds that moving takes)  +  sum_i P_i s_i          seconds per layer and decode step
    s.t. z >= time of every device that holds heads, and of the primary's network card      as for dispatch
         sum_i x_ij = G                                        every running request j
         x_ij = now_ij + a_ij - d_ij                           a arrive, d <= now depart
         sum_j b_j x_ij <= room_i                              every i: KV blocks now
         sum_j m_jt x_ij <= total_i + s_i                      every i and horizon t: KV blocks expected in t steps
         sum_j bytes_j sum_i a_ij <= budget

Moving one head group of request j, in all layers of the stage, moves ``bytes_j``. It occupies the network cards of both
ends, each of which is charged half of its seconds: ``lambda_j bytes_j (link_i + link_k) / 2``. The cost of a move is
paid once, while its gain lasts as long as the request, or until the stage has drifted again. So ``lambda_j = 1 /
(layers x patience x remaining steps of j)`` makes the two comparable: a move pays back within that share of its
request's expected life, and a request about to finish does not move.

In ``t`` steps a request is ``t`` tokens longer, or done. If only its expected remaining steps R are known, it still
runs with probability ``exp(-t / R)``, and that is what ``m_jt`` counts. Blocks that will be short (s) cost P_i, the
prefill of the KV evicted for them, once, and are weighed like moves. A draining device counts as having no blocks, and
their price is so high that every block that can leave does.

Room is the blocks in use or the high-water mark, whichever is greater, or all of a device while another is draining.
Moves should not take the blocks that a device's own requests are about to grow into.

Moves are made in sequence. A move needs room at its target while the source still holds its blocks, which the order of
moves ensures (`hetis.solver.redispatch.moves`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from hetis.solver.dispatch.dispatch_problem import FloatArray
from hetis.solver.dispatch.snapshot import StateSnapshot
from hetis.solver.errors import InvalidProblemError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RedispatchProblem:
    """The question of which head groups of running requests should move."""

    snapshot: StateSnapshot  # contents of the stage; groups already moving are assumed to arrive and are left alone
    num_layers: int  # layers of the stage, in all of which a head group moves
    # Seconds per byte into or out of each device, shape [D]. A move runs at the speed of the slower of its two ends.
    link_byte_s: FloatArray
    budget_bytes: float = np.inf  # maximum KV bytes to move
    # Share of the makespan that all moves together must save, including their cost; otherwise nothing moves unless
    # memory is short.
    least_gain: float = 0.01
    # Share of a request's remaining steps within which its moves must pay back. Less patience moves fewer bytes with
    # more gain each, since removing the rest of the excess makespan takes ever more bytes.
    patience: float = 0.25
    ahead_steps: int = 100  # number of steps for which growth is anticipated; copies take only a few
    # Devices on which a request found no block. As many blocks as they have head groups should become free at any cost,
    # otherwise a request is evicted at once.
    full: frozenset[int] = frozenset()
    refill_token_s: float = 4e-4  # seconds to prefill a token whose KV was evicted again, in all layers of the stage

    def __post_init__(self) -> None:
        num = self.snapshot.stage.num_devices
        if self.num_layers < 1:
            raise InvalidProblemError(f"num_layers is {self.num_layers}, must be >= 1")
        if self.link_byte_s.shape != (num,) or not np.all((self.link_byte_s >= 0) & np.isfinite(self.link_byte_s)):
            raise InvalidProblemError(f"link_byte_s must be {num} finite numbers >= 0")
        if not self.budget_bytes >= 0:
            raise InvalidProblemError(f"budget_bytes is {self.budget_bytes}, must be >= 0")
        if not 0 <= self.least_gain < 1:
            raise InvalidProblemError(f"least_gain is {self.least_gain}, must be >= 0 and < 1")
        if not self.full <= set(range(num)):
            raise InvalidProblemError(f"full devices are {sorted(self.full)}, the stage has {num} devices")
        if not 0 < self.patience <= 1:
            raise InvalidProblemError(f"patience is {self.patience}, must be > 0 and <= 1")
        if self.ahead_steps < 0 or not 0 <= self.refill_token_s < np.inf:
            raise InvalidProblemError(
                f"ahead_steps is {self.ahead_steps} and refill_token_s {self.refill_token_s}, must be finite and >= 0"
            )


# --- the answer


class MoveReason(StrEnum):
    """The reason for a move.

    ``balance``: the slowest device becomes faster. ``memory``: its device is, or will be, short of KV blocks, or
    another move needs its room. ``drain``: its device is to be emptied. ``detour``: the groups wait on a third device
    until their target has room.
    """

    BALANCE = "balance"
    MEMORY = "memory"
    DRAIN = "drain"
    DETOUR = "detour"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Head groups of one request that move from one device to another, in all layers of the stage."""

    request: str  # name of the request
    groups: int  # number of head groups
    # source, target: indices of devices.
    source: int
    target: int
    num_bytes: float  # bytes of KV that are copied
    seconds: float  # time of the copy on the slower of the two links
    # Decode steps after which the move has saved the seconds it took, compared with the plan without it; None if it
    # saves no time and is made for another reason.
    payback_steps: float | None
    reason: MoveReason
    wave: int  # moves of one wave may run concurrently; those of the next wave require their commits
    # Moves with the same number belong to one request and are committed at once, because the primary takes several head
    # groups at once.
    together: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A move that would help but cannot be made, and the reason."""

    request: str
    groups: int
    source: int
    target: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RedispatchPlan:
    """Moves in an order in which they always fit in memory."""

    moves: tuple[Move, ...]  # in order
    refused: tuple[Refused, ...]  # moves that would help but cannot be made
    # makespan_before_s, makespan_after_s: seconds per layer and decode step of the slowest device.
    makespan_before_s: float
    makespan_after_s: float
    # short_before, short_after: KV blocks that are expected to be short, plus all blocks on draining devices, including
    # those of requests with groups under way.
    short_before: float
    short_after: float
    objective_s: float  # makespan, cost of moving and price of short blocks; equal to ``stay_s`` if nothing moves
    stay_s: float  # objective if nothing moves
    bound_s: float  # no placement has a lower objective, as weak duality proves

    @property
    def num_bytes(self) -> float:
        """Return the KV bytes that all moves copy."""
        return sum(move.num_bytes for move in self.moves)

    @property
    def gap(self) -> float:
        """Return how far the objective may be above the best one, as a ratio; 0 if nothing runs."""
        if self.objective_s <= self.bound_s:
            return 0.0
        return self.objective_s / self.bound_s - 1.0 if self.bound_s > 0 else float("inf")
