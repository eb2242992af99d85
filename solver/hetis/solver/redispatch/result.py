"""The answer of re-dispatch: moves in an order that memory allows, their effect, and a bound."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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
    """Head groups of one request that move from one device to another, in all layers of the stage.

    Attributes:
        request: its name.
        groups: how many head groups.
        source, target: indices of devices.
        num_bytes: KV that is copied.
        seconds: time of the copy on the slower of the two links.
        payback_steps: decode steps after which the move has saved the seconds it took, compared with the plan without
            it; None if it saves no time and is made for another reason.
        reason: the reason for the move.
        wave: moves of one wave may run concurrently; those of the next one need their commits.
        together: moves with the same number belong to one request and are committed at once, because the primary takes
            several head groups at once.
    """

    request: str
    groups: int
    source: int
    target: int
    num_bytes: float
    seconds: float
    payback_steps: float | None
    reason: MoveReason
    wave: int
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
    """Moves whose every prefix fits in memory.

    Attributes:
        moves: in order.
        refused: moves that were left out.
        makespan_before_s, makespan_after_s: seconds per layer and decode step of the slowest device.
        short_before, short_after: KV blocks that are expected to be short, and all blocks on draining devices,
            including those of requests with groups under way.
        objective_s: makespan, cost of moving and price of short blocks; equal to ``stay_s`` if nothing moves.
        stay_s: objective of doing nothing.
        bound_s: no placement has a lower objective, as weak duality proves.
    """

    moves: tuple[Move, ...]
    refused: tuple[Refused, ...]
    makespan_before_s: float
    makespan_after_s: float
    short_before: float
    short_after: float
    objective_s: float
    stay_s: float
    bound_s: float

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
