"""How the loop decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from hetis.planner.loop.drift import DriftTest
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.solver.errors import InvalidProblemError
from hetis.solver.replanning.change import ChangeCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How the loop decides.

    Attributes:
        costs: what a change costs. Its horizon is the time over which that is repaid.
        every_s: time between two regular questions.
        watch_s: time between two looks for a shortage, or for much less demand.
        coverage: probability with which demand until the next look can be answered is at most what is kept.
        look_ahead_s: time for whose demand a change is made.
        lasting: probability with which that demand is at most what is planned for.
        false_alarms_per_day: probability at most of an alarm about drift in a day without any.
        tolerance: share of the requests by which the mix, or prefix hits, may differ from the plan's.
        least_gain: of what the plan in force yields, that a change other than out of a shortage must gain.
        cool_down_s: least time between a change and one that is not out of a shortage.
        changes_per_hour: most changes in an hour that the planner makes itself; a cluster's policy has its own.
        max_moves: limit on the GPUs that change their work in one change; None: any number.
        search: settings of searches, which may choose another rung.
    """

    costs: ChangeCosts = field(default_factory=ChangeCosts)
    every_s: float = 300.0
    watch_s: float = 10.0
    coverage: float = 0.975
    look_ahead_s: float = 300.0
    lasting: float = 0.85
    false_alarms_per_day: float = 0.1
    tolerance: float = 0.1
    least_gain: float = 0.05
    cool_down_s: float = 300.0
    changes_per_hour: int = 20
    max_moves: int | None = None
    search: PlacementSettings = field(default_factory=PlacementSettings)

    def __post_init__(self) -> None:
        for name, least, most in (
            ("every_s", 1, 86400), ("watch_s", 1, 86400), ("coverage", 0.5, 0.9999), ("look_ahead_s", 60, 86400),
            ("lasting", 0.5, 0.9999), ("false_alarms_per_day", 1e-9, 1e3), ("tolerance", 0.01, 0.5),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise InvalidProblemError(f"{name} is {getattr(self, name):g}, must be {least:g} to {most:g}")

    @property
    def lead_s(self) -> float:
        """Time until a change that is decided at the next look serves, at the latest."""
        return self.watch_s + max(60.0, 2 * self.costs.restart_s)

    def drift_test(self, window_s: float) -> DriftTest:
        """Return the test for windows of so many seconds."""
        return DriftTest(false_alarms_per_day=self.false_alarms_per_day, window_s=window_s)
