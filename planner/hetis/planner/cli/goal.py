"""The goal of a plan, from the options of the command line to the planner's messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from google.protobuf.duration_pb2 import Duration

from hetis.formats.catalogue import UnknownNameError, find_model, find_workload
from hetis.formats.documents import dump, load_cluster, load_model, load_profile, load_workload
from hetis.formats.traces import PrefixHitRate
from hetis.planner.cli.quantities import NO_LIMIT
from hetis.planner.cli.resource_names import full_name, id_of
from hetis.planner.client import Client
from hetis.planner.convert.plans import TO_PROTO
from hetis.solver.plan import ObjectiveKind, Plan, Role
from hetis.v1 import document_pb2, plan_pb2

if TYPE_CHECKING:
    from hetis.planner.use_cases.sources import ReplicaLimits
    from hetis.solver.problem import EngineSettings

_KINDS = {
    ObjectiveKind.GOODPUT: plan_pb2.OBJECTIVE_KIND_GOODPUT,
    ObjectiveKind.THROUGHPUT: plan_pb2.OBJECTIVE_KIND_THROUGHPUT,
    ObjectiveKind.COST: plan_pb2.OBJECTIVE_KIND_COST,
    ObjectiveKind.GPUS: plan_pb2.OBJECTIVE_KIND_GPUS,
}
_MEAN_LENGTHS = re.compile(r"[\d.]+/[\d.]+")
_NEEDS_DEMAND = (ObjectiveKind.COST, ObjectiveKind.GPUS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The options of ``apply`` that make a problem; None: not given."""

    cluster: str | None
    model: str | None
    workload: str | None
    prefix_hit_rate: PrefixHitRate | None
    profiles: tuple[str, ...]
    objective: ObjectiveKind
    rate_rps: float | None
    ttft_s: float | None
    tpot_s: float | None
    strategy: str
    roles: frozenset[Role]  # empty: all of the strategy
    weights: str | None
    kv: str | None
    mtp: str | None
    survive: str  # node or zone; empty: nothing
    engine: str | None
    limits: ReplicaLimits
    engine_settings: EngineSettings
    time_limit_s: float
    gap_target: float
    seed: int
    threads: int

    @property
    def solves(self) -> bool:
        """Return whether there is a problem to solve."""
        return self.model is not None or self.workload is not None

    def refuse_contradictions(self, plan_file: str | None) -> None:
        """Refuse missing and contradictory options before any call."""
        if self.solves and plan_file is not None:
            raise typer.BadParameter("--plan is an answer already: it goes without --model and --workload")
        missing = [
            name
            for name, value in (("--cluster", self.cluster), ("--model", self.model), ("--workload", self.workload))
            if value is None
        ]
        if self.solves and missing:
            raise typer.BadParameter(f"to solve, {' and '.join(missing)} must be said too")
        if self.solves and self.objective in _NEEDS_DEMAND and self.rate_rps is None:
            raise typer.BadParameter(f"--objective {self.objective.value} needs --rate")

    def documents(self) -> list[tuple[str, Any]]:
        """Read the files of the cluster and of profiles.

        Raises:
            DocumentError: one of them is not usable.
        """
        return list(self._files())

    def _files(self) -> Iterator[tuple[str, Any]]:
        if self.cluster is not None and _is_file(self.cluster):
            yield self.cluster, load_cluster(self.cluster)
        for profile in self.profiles:
            if _is_file(profile):
                yield profile, load_profile(profile)

    def plan(self, client: Client) -> plan_pb2.Plan:
        """Return the plan to create."""
        assert self.cluster is not None
        return plan_pb2.Plan(cluster=self._cluster_name(self.cluster), spec=self._spec())

    def cluster_of_plan(self, client: Client, plan: Plan) -> str:
        """Return the cluster of an imported plan: the one named, or the one whose document it was made from."""
        if self.cluster is not None:
            return self._cluster_name(self.cluster)
        made_from = plan.inputs.get("documents", {}).get("cluster", {}).get("name", "")
        if not made_from:
            raise typer.BadParameter("the plan does not say which cluster it is for: --cluster")
        return full_name("clusters", id_of(str(made_from)))

    def _cluster_name(self, given: str) -> str:
        return full_name("clusters", id_of(load_cluster(given).name) if _is_file(given) else given)

    def _spec(self) -> plan_pb2.PlanSpec:
        spec = plan_pb2.PlanSpec(
            profiles=[
                full_name("profiles", id_of(load_profile(name).gpu) if _is_file(name) else name)
                for name in self.profiles
            ],
            objective=self._objective(),
            strategy=self.strategy,
            roles=[TO_PROTO[role] for role in Role if role in self.roles],
            weights=self.weights or "",
            kv=self.kv or "",
            mtp=self.mtp or "",
            survive=self.survive,
            engine=self.engine or "",
            max_stages=self.limits.max_stages or 0,
            max_gpus=self.limits.max_gpus or 0,
            min_layers=self.limits.min_layers or 0,
            max_nodes=self.limits.max_nodes or 0,
            max_num_seqs=self.engine_settings.max_num_seqs or 0,
            chunk_tokens=self.engine_settings.chunk_tokens,
            kv_blocks=self.engine_settings.kv_blocks or 0,
            gap_target=self.gap_target,
            time_limit=_duration(self.time_limit_s),
            seed=self.seed,
            num_threads=self.threads,
        )
        self._say_model(spec)
        self._say_workload(spec)
        return spec

    def _say_model(self, spec: plan_pb2.PlanSpec) -> None:
        assert self.model is not None
        try:
            spec.model_name = find_model(self.model).model.name
        except UnknownNameError:
            value = load_model(self.model)  # a file, or the error with the nearest name
            spec.model_document.CopyFrom(_document(self.model, dump(value, "json")))
            spec.model_document.kind = document_pb2.DOCUMENT_KIND_MODEL_SPEC

    def _say_workload(self, spec: plan_pb2.PlanSpec) -> None:
        assert self.workload is not None
        name = None if self.prefix_hit_rate is not None else _workload_name(self.workload)
        if name is not None:
            spec.workload_name = name
            return
        value = load_workload(self.workload, prefix_hit_rate=self.prefix_hit_rate)
        spec.workload_document.CopyFrom(_document(self.workload, dump(value, "json")))
        spec.workload_document.kind = document_pb2.DOCUMENT_KIND_WORKLOAD

    def _objective(self) -> plan_pb2.Objective:
        goal = plan_pb2.Objective(kind=_KINDS[self.objective], demand_rps=self.rate_rps or 0.0)
        if self.ttft_s == NO_LIMIT:
            goal.ttft_unlimited = True
        elif self.ttft_s is not None:
            goal.ttft_limit_s = self.ttft_s
        if self.tpot_s == NO_LIMIT:
            goal.tpot_unlimited = True
        elif self.tpot_s is not None:
            goal.tpot_limit_s = self.tpot_s
        return goal


def _workload_name(text: str) -> str | None:
    """Return the name by which the planner knows a workload without its document; None: it needs the document."""
    if _MEAN_LENGTHS.fullmatch(text):
        return text
    try:
        return find_workload(text).workload.name
    except UnknownNameError:
        return None


def _is_file(text: str) -> bool:
    """Return whether a text is a path and not a name: by its form, or because it exists."""
    return text.endswith((".yaml", ".yml", ".json")) or Path(text).exists()


def _document(path: str, content: str) -> document_pb2.Document:
    return document_pb2.Document(content=content.encode("utf-8"), source_name=path[-255:])


def _duration(value_s: float) -> Duration:
    found = Duration()
    found.FromNanoseconds(round(value_s * 1e9))
    return found
