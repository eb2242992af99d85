"""Plans for LLM serving on mixed GPU fleets, with a proof of how good each plan is.

    import hetis

    plan = hetis.place("cluster.yaml", "Llama-2-70B", "azure_conv_2023", tpot="200ms")
    plan.report("report.html", simulate=True)

Everything named here is imported on first use: importing `hetis` loads nothing but this module, so that agents and
engines, which use packages inside it, need none of the planner's libraries. `hetis` is spread over several folders
of the source tree (and is one folder in an installation), so this module searches for the others.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetis.planner.client import Client
    from hetis.planner.export.targets import Export
    from hetis.planner.library.placing import load_cluster, load_plan, place
    from hetis.planner.library.plan import Plan, Simulation
    from hetis.solver.errors import HetisError, InfeasibleError, NoPlanFoundError

    __version__: str

__path__ = extend_path(__path__, __name__)

__all__ = [
    "Client",
    "Export",
    "HetisError",
    "InfeasibleError",
    "NoPlanFoundError",
    "Plan",
    "Simulation",
    "__version__",
    "load_cluster",
    "load_plan",
    "place",
]

_HOMES = {
    "Client": "hetis.planner.client",
    "Export": "hetis.planner.export.targets",
    "HetisError": "hetis.solver.errors",
    "InfeasibleError": "hetis.solver.errors",
    "NoPlanFoundError": "hetis.solver.errors",
    "Plan": "hetis.planner.library.plan",
    "Simulation": "hetis.planner.library.plan",
    "load_cluster": "hetis.planner.library.placing",
    "load_plan": "hetis.planner.library.placing",
    "place": "hetis.planner.library.placing",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("hetis")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'hetis' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
