"""Heuristics of other planners as published, under our cost model: for comparison, not for planning.

A published heuristic returns a plan like any other, which the same checker accepts; only its bound is weak. Whatever
its paper leaves open is reconstructed, which the heuristic's module and `docs/strategies.md` state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from hetis.solver.budget import Budget, Report
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.hetis_paper import solve_hetis_paper
from hetis.solver.published.hexgen import solve_hexgen
from hetis.solver.published.hexgen2 import solve_hexgen2
from hetis.solver.published.splitwise import solve_splitwise


class Solve(Protocol):
    """A heuristic; ``problem.family`` is the strategy's own.

    Raises:
        NoPlanFoundError: it finds no plan, which proves nothing.
    """

    def __call__(self, problem: PlacementProblem, *, budget: Budget, seed: int, report: Report) -> Plan: ...


@dataclass(frozen=True, slots=True)
class Published:
    """A published heuristic: its name, one sentence for people, and the function that runs it."""

    name: str
    summary: str
    solve: Solve


PUBLISHED: Mapping[str, Published] = {
    published.name: published
    for published in (
        Published(
            "splitwise-paper",
            "Splitwise's provisioning: machines of one kind prefill, machines of one kind decode, the rest is mixed",
            solve_splitwise,
        ),
        Published(
            "hexgen-paper",
            "HexGen's genetic search over groups of GPUs: moves, splits and merges",
            solve_hexgen,
        ),
        Published(
            "hexgen2-paper",
            "HexGen-2's heuristic: spectral partition, Kernighan-Lin, maximum flow, guided swaps",
            solve_hexgen2,
        ),
        Published(
            "hetis-paper",
            "Hetis's heuristic: hierarchical DP/PP/TP, 5% rule, attention workers shared by a replica",
            solve_hetis_paper,
        ),
    )
}
