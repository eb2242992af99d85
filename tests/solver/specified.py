"""Which problems the compact MILP solves in about a second; the others, which take up to half a minute, are soaked."""

from __future__ import annotations

import numpy as np
import pytest

from hetis.solver.problem import PlacementProblem
from tests.solver import specification
from tests.solver.specification import Sets

modelling = np.errstate(over="ignore", invalid="ignore")
"""For functions that use cvxpy, which finds shapes by summing uninitialised memory: numpy warns of what that holds."""
solve_specification = modelling(specification.solve_specification)

EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["small", "every"])
FEW_CHOICES = 500  # number of choices in all stage slots together


def is_soon_solved(problem: PlacementProblem) -> bool:
    """Return whether the MILP with as many replicas and stages as GPUs has few choices."""
    slots = problem.cluster.num_gpus()
    if slots > 2 and problem.model.num_layers > 5:
        return False  # larger problems rarely have few, and listing them takes a second
    return sum(len(slot) for slot in Sets.of(problem, slots).slots) <= FEW_CHOICES
