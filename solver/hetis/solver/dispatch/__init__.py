"""Dispatch: on which devices the head groups of new requests live, with a proof of how good the choice is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetis.solver.dispatch.solve import Dispatcher as Dispatcher
    from hetis.solver.dispatch.solve import solve_dispatch as solve_dispatch

__all__ = ["Dispatcher", "solve_dispatch"]


def __getattr__(name: str) -> Any:
    # Compiled kernels and HiGHS are loaded when a dispatch is asked for, not when a submodule is.
    if name in __all__:
        from hetis.solver.dispatch import solve

        return getattr(solve, name)
    raise AttributeError(name)
