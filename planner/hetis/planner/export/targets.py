"""The targets by name, and complete exports: files with README and router weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hetis.engines.versions import Engine
from hetis.planner.export.compose import write_compose
from hetis.planner.export.dynamo import write_dynamo
from hetis.planner.export.hetis_launch import write_hetis_launch
from hetis.planner.export.kserve import write_kserve
from hetis.planner.export.kubernetes import write_kubernetes
from hetis.planner.export.llm_d import write_llm_d
from hetis.planner.export.lws import write_lws
from hetis.planner.export.names import Target
from hetis.planner.export.ray_serve import write_ray
from hetis.planner.export.replicas import Launchable, Settings, launchable
from hetis.planner.export.routing import routing_files
from hetis.planner.export.shell import write_shell
from hetis.planner.export.slurm import write_slurm
from hetis.planner.export.written import Written, readme_of
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An export.

    Attributes:
        files: text by path.
        shown: the essential files, for standard output.
        lost: what is not carried of the plan, a sentence each.
        rate: saturated requests/s that remain of ``planned``.
    """

    files: Mapping[str, str]
    shown: tuple[str, ...]
    lost: tuple[str, ...]
    planned: float
    rate: float


_WRITERS: Mapping[Target, Callable[[Launchable], Written]] = {
    Target.VLLM: write_shell,
    Target.SGLANG: write_shell,
    Target.COMPOSE: write_compose,
    Target.KUBERNETES: write_kubernetes,
    Target.LWS: write_lws,
    Target.LLM_D: write_llm_d,
    Target.KSERVE: write_kserve,
    Target.DYNAMO: write_dynamo,
    Target.RAY: write_ray,
    Target.SLURM: write_slurm,
    Target.HETIS_LAUNCH: write_hetis_launch,
}
# The engines that a target runs; all others take any engine.
ENGINES: Mapping[Target, tuple[Engine, ...]] = {
    Target.VLLM: (Engine.VLLM_HETIS, Engine.VLLM),
    Target.SGLANG: (Engine.SGLANG,),
}


def export_plan(plan: Plan, model: ModelSpec, target: Target, settings: Settings) -> Export:
    """Return a plan as the files of a target.

    Raises:
        NotExportableError: no replica can be launched in this way.
    """
    found = launchable(plan, model, settings)
    written = _WRITERS[target](found)
    found = found.without(written.left_out)
    files = {
        "README.md": readme_of(target.value, found, written),
        **written.files,
        **routing_files(found, written.endpoints),
    }
    return Export(
        files=files,
        shown=written.shown,
        lost=(*found.changes, *found.reasons(), *written.not_carried),
        planned=plan.served_rate(),
        rate=found.rate(),
    )
