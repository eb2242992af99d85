"""Placement: which GPUs form which replicas, with a proof of how good the choice is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetis.solver.placement.solve import solve_placement as solve_placement

__all__ = ["solve_placement"]


def __getattr__(name: str) -> Any:
    # Compiled kernels and HiGHS are loaded when a placement is asked for, not when a submodule is.
    if name == "solve_placement":
        from hetis.solver.placement.solve import solve_placement

        return solve_placement
    raise AttributeError(name)
