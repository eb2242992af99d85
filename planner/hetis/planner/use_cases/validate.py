"""Validation and identification of a document of any kind."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.formats.dispatch_state import NewRequests
from hetis.formats.documents import Value, kind_of, load, load_model, load_workload
from hetis.formats.errors import DocumentError, Problem
from hetis.formats.fields import read_data
from hetis.formats.saved_state import SavedState
from hetis.formats.tenants import FleetTenants, ShareInputs
from hetis.solver.cluster import Cluster
from hetis.solver.layers.problem import LayersProblem
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan
from hetis.solver.profile import Profile
from hetis.solver.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """The result for one file: its kind and name if it is valid, else its problems."""

    file: str
    kind: str | None = None
    name: str = ""
    problems: tuple[Problem, ...] = ()


def validate_file(path: str) -> Validation:
    """Read a file as the kind it states; traces and Hugging Face configs are recognised by their form."""
    try:
        value = _load_any(path)
    except DocumentError as error:
        return Validation(file=path, problems=error.problems)
    return Validation(file=path, kind=kind_of(value), name=_name(value))


def _load_any(path: str) -> Value:
    if path.endswith((".csv", ".csv.gz")):
        return load_workload(path)
    if path.endswith("config.json"):
        data, _ = read_data(path)
        if isinstance(data, dict) and "kind" not in data and "model_type" in data:
            return load_model(path)
    return load(path)


def _name(value: Value) -> str:
    match value:
        case Cluster() | ModelSpec() | Workload() | SavedState() | LayersProblem():
            return value.name
        case Profile():
            return value.gpu
        case Plan():
            return f"{value.strategy}, {len(value.replicas)} replicas"
        case NewRequests():
            return f"{len(value.requests)} requests"
        case ShareInputs() | FleetTenants():
            return f"{len(value.tenants)} tenants"
