"""The input of a re-planning: the plan that runs, the fleet and traffic as they are now, and the costs of a change."""

from __future__ import annotations

from dataclasses import dataclass, field

from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

HALF_DONE = 0.5  # average share of the service of a request in flight that is lost if its KV is dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeCosts:
    """The costs of a change, in seconds in which a replica does not serve.

    Attributes:
        horizon_s: how long the new plan is expected to last: a loss that occurs once is spread over it.
        restart_s: from stopping an engine to serving again, without reading weights.
        load_bytes_per_s: the rate at which every GPU reads its weights, all at the same time.
    """

    horizon_s: float = 3600.0
    restart_s: float = 30.0
    load_bytes_per_s: float = 2e9

    def __post_init__(self) -> None:
        for name in ("horizon_s", "load_bytes_per_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidProblemError(f"{name} is {getattr(self, name)}, must be above 0 and finite")
        if not 0 <= self.restart_s < float("inf"):
            raise InvalidProblemError(f"restart_s is {self.restart_s}, must be >= 0 and finite")

    def start_s(self, longest_load_bytes: float) -> float:
        """Return the time until a replica serves, given the bytes of the GPU that reads the most."""
        return self.restart_s + longest_load_bytes / self.load_bytes_per_s

    def served_share(self, start_s: float) -> float:
        """Return the share of the horizon in which a replica serves."""
        return max(0.0, 1.0 - start_s / self.horizon_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplanningProblem:
    """The running plan and the problem as it is now: its cluster is what remains and what has joined.

    ``max_moves``: how many GPUs of the new plan may do something else than before; None: any number.
    """

    running: Plan
    problem: PlacementProblem
    costs: ChangeCosts = field(default_factory=ChangeCosts)
    max_moves: int | None = None

    def __post_init__(self) -> None:
        if self.max_moves is not None and self.max_moves < 0:
            raise InvalidProblemError(f"max_moves is {self.max_moves}, must be >= 0")
