"""Documents from files."""

from __future__ import annotations

import os

from hetis.formats import documents
from hetis.planner.library.plan import Plan
from hetis.planner.use_cases.sources import load_plan_and_problem
from hetis.solver.cluster import Cluster


def load_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Read a Cluster file.

    Raises:
        HetisError: with every problem of the file, each with its line.
    """
    return documents.load_cluster(os.fspath(path))


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan that `Plan.save` or ``hetis-plan place --out`` wrote; it contains its inputs.

    Raises:
        HetisError: the plan, or a document in it, is not usable.
    """
    found = load_plan_and_problem(os.fspath(path))
    return Plan(value=found.plan, problem=found.problem)
