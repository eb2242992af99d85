"""Messages between the scheduler and the ranks for each step. They are plain values, pickled by vLLM itself.

Every request has an *anchor*: one block of vLLM's pool that holds no KV and stands alone in the request's block table.
Its number identifies the request on the ranks, whose attention metadata carries block tables but no names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hetis.runtime.vllm.calibration import Calibration
    from hetis.runtime.vllm.costs import LayerTime

LOCAL = 0  # the rank itself as a device; workers count from 1


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request began; its groups live on these devices."""

    anchor: int
    number: int  # identifies the request to workers; never reused
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Gone:
    """A request ended, or was preempted: all its KV is void."""

    anchor: int


@dataclass(frozen=True, slots=True)
class Grown:
    """New blocks of one local group, from block ``first`` of its table on."""

    anchor: int
    group: int
    first: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rehomed:
    """The new devices of the groups of a request that is recomputed from its first token."""

    anchor: int
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GroupMove:
    """Groups of one request on their way to another device. `Grown` gives them blocks if that is `LOCAL`.

    The solver's `PreparedMove` only counts groups, and the contract's `Move` names requests and devices as planners do.
    """

    number: int  # number of the solver's move, increasing
    anchor: int
    groups: tuple[int, ...]
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class MoveStep:
    """A phase of a move: its copies begin, the target owns the groups from this step on, or it is aborted."""

    phase: Literal["begin", "commit", "abort"]
    move: GroupMove


Event = Admitted | Gone | Grown | Rehomed | MoveStep


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The changes since the previous step, in order."""

    number: int
    events: tuple[Event, ...] = ()


@dataclass(slots=True)
class Exchanged:
    """Counters of a worker's exchanges, one per layer and step."""

    exchanges: int = 0
    exchange_s: float = 0.0  # seconds from a call to its answer, summed over the exchanges
    bytes_sent: int = 0
    bytes_received: int = 0

    def add(self, later: Exchanged) -> None:
        self.exchanges += later.exchanges
        self.exchange_s += later.exchange_s
        self.bytes_sent += later.bytes_sent
        self.bytes_received += later.bytes_received


@dataclass(slots=True)
class WorkerReport:
    """One rank's report on its worker on one device."""

    blocks: int  # KV blocks of one head group that it holds in total; 0: it is lost
    exchanged: Exchanged = field(default_factory=Exchanged)  # exchanges since the last report


@dataclass(slots=True)
class RankReport:
    """One rank's report after a step, or None instead if there is nothing to report."""

    # Reports by device index, for devices that changed or whose counters are due
    devices: dict[int, WorkerReport] = field(default_factory=dict)
    # Moves, by number, whose copies are complete up to the tokens present at that time
    copied: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)  # moves that failed
    # Time of a layer in the latest decode steps on each device, including `LOCAL`; sent with ``devices``
    taken: dict[int, list[LayerTime]] = field(default_factory=dict)
    # Calibrations of devices that have joined since the last report
    calibrations: dict[int, Calibration] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.devices or self.copied or self.failed or self.taken or self.calibrations)
