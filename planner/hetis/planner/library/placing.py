"""Plans for a model on a fleet, as made by ``hetis-plan place``, and documents from files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from textwrap import fill
from typing import ParamSpec, TypeVar

from hetis.formats import documents
from hetis.planner.export.carrying import not_carried
from hetis.planner.library.arguments import checked, spelled_as_arguments
from hetis.planner.library.plan import Plan
from hetis.planner.use_cases.place import pose
from hetis.planner.use_cases.request import FIELDS, File, PlacementRequest, types_of_fields
from hetis.planner.use_cases.saved_plans import load_plan_and_problem
from hetis.solver.budget import Progress, silent
from hetis.solver.cluster import Cluster

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Arguments(PlacementRequest):
    """The arguments of `place`: a placement request, and what is called with its progress."""

    progress: Callable[[Progress], None] = field(default=silent, kw_only=True)


# An unknown engine is refused with more than a list of names, which may say why one is gone.
CHECKED = {**types_of_fields(), "engine": str | None, "progress": Callable[[Progress], None]}


def _with_arguments(made: Callable[P, Arguments]) -> Callable[[Callable[[Arguments], T]], Callable[P, T]]:
    """Return a decorator: the function takes the fields of its arguments, checked, one by one."""

    def decorate(function: Callable[[Arguments], T]) -> Callable[P, T]:
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return function(made(*args, **kwargs))

        call.__name__ = call.__qualname__ = function.__name__
        call.__module__ = function.__module__
        call.__signature__ = signature(made).replace(return_annotation=Plan)  # type: ignore[attr-defined]
        call.__doc__ = _documented(function.__doc__ or "")
        return checked(spelled_as_arguments(call), CHECKED)

    return decorate


def _documented(text: str) -> str:
    """Return a docstring with the fields of a request as its arguments."""
    lines = (_line(name, **one.metadata["option"]) for name, one in FIELDS.items())
    return text.replace("    Raises:", "\n".join(["    Args:", *lines, "", "    Raises:"]))


def _line(name: str, *, usage: str, shown: str | bool, **_: object) -> str:
    default = f" Default: {shown}." if isinstance(shown, str) else ""
    words = f"{name}: {usage.partition(': ')[2]}{default}"
    return fill(words, 100, initial_indent=" " * 8, subsequent_indent=" " * 12)


@_with_arguments(Arguments)
def place(request: Arguments) -> Plan:
    """Decide which GPUs form which replicas, with a proof of optimality. Options are those of the command.

    Cluster, model and workload may be values, too, and quantities numbers (of seconds, or shares of 1). A limit of None
    is none. ``progress`` is called with progress of the search, from this thread.

    Raises:
        InfeasibleError: no plan exists; contains the reasons.
        NoPlanFoundError: none was found within the time limit.
        HetisError: arguments are wrong, or an input is not usable; the message names them.
    """
    placed = pose(request, not_carried).place(request.progress)
    return Plan(value=placed.plan, problem=placed.problem)


@checked
def load_cluster(path: File) -> Cluster:
    """Read a Cluster file.

    Raises:
        HetisError: with every problem of the file, each with its line.
    """
    return documents.load_cluster(os.fspath(path))


@checked
def load_plan(path: File) -> Plan:
    """Read a plan that `Plan.save` or ``hetis-plan place --out`` wrote; it contains its inputs.

    A plan whose inputs were altered since gives a UserWarning.

    Raises:
        HetisError: the plan, or a document in it, is not usable.
    """
    found = load_plan_and_problem(os.fspath(path))
    for warning in found.warnings:
        warnings.warn(f"{os.fspath(path)}: {warning}", stacklevel=3)
    return Plan(value=found.plan, problem=found.problem)
