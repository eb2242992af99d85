"""Dispatch: the choice of devices for the head groups of new requests, with a proof of how good it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetis.solver.dispatch.solve import Dispatcher as Dispatcher
    from hetis.solver.dispatch.solve import solve_dispatch as solve_dispatch

__all__ = ["Dispatcher", "solve_dispatch"]


def __getattr__(name: str) -> Any:
    # Compiled kernels and HiGHS are loaded on first use of a solver, not on import of a submodule.
    if name in __all__:
        from hetis.solver.dispatch import solve

        return getattr(solve, name)
    raise AttributeError(name)
