"""The set-up of HiGHS for every use: quiet, on one thread, within a time limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import highspy
import numpy as np

# For linear programs that start with few columns and receive more: a feasible solution remains feasible.
GROWING_SIMPLEX: Mapping[str, str | int | float] = {
    "presolve": "off",
    "solver": "simplex",
    "simplex_strategy": 4,  # primal: columns are added, rows never
    "primal_feasibility_tolerance": 1e-9,
    "dual_feasibility_tolerance": 1e-9,
}
LEAST_S = 0.01  # least time limit given to HiGHS


def quiet_highs(
    options: Mapping[str, str | int | float] | None = None,
    *,
    time_limit_s: float = np.inf,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> Any:
    """Return a HiGHS solver without a model. ``options`` have HiGHS's names; an infinite time limit sets none.

    The limit is in wall time. ``stop`` is polled for an end by other clocks or for other reasons.
    """
    highs: Any = highspy.Highs()
    highs.silent()
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("random_seed", seed)
    for option, value in (options or {}).items():
        highs.setOptionValue(option, value)
    if np.isfinite(time_limit_s):
        highs.setOptionValue("time_limit", max(LEAST_S, time_limit_s))
    if stop is not None:

        def interrupt(event: Any) -> None:
            if stop():
                event.interrupt()

        highs.cbMipInterrupt.subscribe(interrupt)
        highs.cbSimplexInterrupt.subscribe(interrupt)
    return highs
