"""The steps of ``apply``: documents, then a plan, then its activation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import typer

from hetis.commands.terminal import Terminal
from hetis.formats.catalogue import UnknownNameError, checkpoint_of, find_workload
from hetis.formats.documents import Value, dump, load, load_cluster, load_model, load_plan, load_profile, load_workload
from hetis.formats.errors import DocumentError
from hetis.formats.files import write_atomically
from hetis.formats.positions import parse_text
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.outputs import STDOUT, refuse_unwritable
from hetis.planner.cli.parameters import options
from hetis.planner.cli.parameters.requests import options_given
from hetis.planner.cli.server.resource_views import list_data
from hetis.planner.cli.server.server_verb import called, fetched, full_name, id_of
from hetis.planner.cli.server.waiting import outcome, show_plan, wait_for_plan
from hetis.planner.client import CallError, Client, document_of_file
from hetis.planner.convert.plan_specs import spec_from_request
from hetis.planner.use_cases.record.parts import MadeFrom
from hetis.planner.use_cases.request import PlacementRequest
from hetis.planner.use_cases.sources import impossible_profiles
from hetis.solver.cluster import Cluster, GpuType
from hetis.solver.plan import Plan
from hetis.solver.profile import Profile
from hetis.v1 import cluster_pb2, document_pb2, plan_pb2, plan_service_pb2, profile_pb2

_MEAN_LENGTHS = re.compile(r"[\d.]+/[\d.]+")


def document(path: str, value: Value, kind: document_pb2.DocumentKind.ValueType) -> document_pb2.Document:
    """Return the file from which ``value`` was read, unchanged, so that the planner's messages refer to its lines.

    Standard input cannot be read twice, so ``value`` is serialised instead.
    """
    return _content("stdin", value, kind) if path == "-" else document_of_file(path, kind)


def apply_resource(
    client: Client, path: str, value: Cluster | Profile, *, dry_run: bool, may_rename: bool
) -> tuple[Any, str]:
    """Create or update the cluster or profile of a file, under an id made from its name or GPU type.

    The update carries the etag that was read, so that it never overwrites another client's change. Return the resource,
    and whether it was created, updated or left unchanged.

    Raises:
        CallError: the planner refused something, or the cluster with this id has another name and not ``may_rename``.
    """
    field, message, form, own = (
        ("cluster", cluster_pb2.Cluster, document_pb2.DOCUMENT_KIND_CLUSTER, id_of(value.name))
        if isinstance(value, Cluster)
        else ("profile", profile_pb2.Profile, document_pb2.DOCUMENT_KIND_PROFILE, id_of(value.gpu))
    )

    def call(verb: str, **fields: Any) -> Any:
        fields |= {field: wanted, "validate_only": dry_run}
        return getattr(called(client, verb, f"{field}s", **fields), field)

    wanted = message(name=f"{field}s/{own}", document=document(path, value, form))
    try:
        present = fetched(client, f"{field}s", wanted.name, basic=not isinstance(value, Cluster))
    except CallError as error:
        if error.reason != "NOT_FOUND":
            raise
        return call("Create", **{f"{field}_id": own}), "created"
    if isinstance(value, Cluster) and not may_rename:
        _refuse_other_name(wanted.name, value.name, _name_in(present.document))
    wanted.etag = present.etag
    changed = call("Update")
    same = present.document.digest and present.document.digest == changed.document.digest
    return changed, "unchanged" if same else "updated"


def _refuse_other_name(resource: str, name: str, stored: str) -> None:
    """Refuse to replace a cluster of another name: ids leave out what names differ in, such as case and dots."""
    if stored not in ("", name):
        message = f"{resource} is the cluster named {stored!r}, and the file's is named {name!r}, which has the same id"
        advice = "to replace it, give --rename, otherwise name the file's cluster differently"
        raise CallError(f"{message}: {advice}", code=grpc.StatusCode.FAILED_PRECONDITION)


def _name_in(stored: document_pb2.Document) -> str:
    """Return the name of a cluster in a document that the planner accepted; empty if it has none."""
    data, _ = parse_text(stored.content.decode("utf-8", "replace"), stored.source_name)
    name = data.get("name") if isinstance(data, dict) else None
    return name if isinstance(name, str) else ""


# --- the problem of a plan


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """The options of ``apply`` that define a placement problem: its cluster and profiles may be names or files."""

    request: PlacementRequest

    @property
    def is_given(self) -> bool:
        return bool(self.request.model or self.request.workload)

    @property
    def _cluster(self) -> str:
        return str(self.request.cluster)

    def refuse_contradictions(self, plan_file: str | None) -> None:
        """Refuse missing and contradictory options before any call."""
        if not self.is_given:
            self._refuse_what_needs_a_search()
            return
        if plan_file is not None:
            raise typer.BadParameter("--plan imports a finished plan: leave out --model and --workload")
        if missing := [f"--{name}" for name in ("cluster", "model", "workload") if not getattr(self.request, name)]:
            raise typer.BadParameter(f"to solve, {' and '.join(missing)} must be given too")
        goal = self.request.goal
        if not goal.maximises and goal.demand_rps is None:
            raise typer.BadParameter(f"--objective {goal.kind.value} needs --rate")

    def _refuse_what_needs_a_search(self) -> None:
        """Refuse options of a search if there is none: they would be ignored."""
        applied = ("cluster", "profiles")  # files to apply, or the cluster of an imported plan
        ignored = [option for name, option in options_given().items() if name not in applied]
        if ignored:
            need = "need" if ignored[1:] else "needs"
            what = " and ".join(filter(None, (", ".join(ignored[:-1]), ignored[-1])))
            raise typer.BadParameter(f"{what} {need} --model and --workload, without which nothing is solved")

    def documents(self) -> Iterator[tuple[str, Value]]:
        """Yield path and value of the cluster file and of each profile. Raises DocumentError if one is not usable.

        The planner checks a profile against a cluster that is not in a file, once it plans with both.
        """
        types: Mapping[str, GpuType] = {}
        if _is_file(self._cluster):
            cluster = load_cluster(self._cluster)
            types = cluster.gpu_types
            yield self._cluster, cluster
        for path in map(str, self.request.profiles):
            if _is_file(path):
                profile = load_profile(path)
                if problems := impossible_profiles({profile.gpu: (path, profile)}, types):
                    raise DocumentError(problems)
                yield path, profile

    def plan(self) -> plan_pb2.Plan:
        return plan_pb2.Plan(cluster=_cluster_name(self._cluster), spec=self._spec())

    def cluster_of_plan(self, plan: Plan) -> str:
        """Return the cluster of an imported plan: the specified one, or the one that the plan was made from."""
        if self._cluster:
            return _cluster_name(self._cluster)
        made_from = MadeFrom.of(plan).document("cluster").get("name", "")
        if not made_from:
            raise typer.BadParameter("the plan does not name its cluster: give --cluster")
        return full_name("clusters", id_of(str(made_from)))

    def _spec(self) -> plan_pb2.PlanSpec:
        request, model, workload = self.request, str(self.request.model), str(self.request.workload)
        paths = map(str, request.profiles)
        profiles = (id_of(load_profile(name).gpu) if _is_file(name) else name for name in paths)
        spec = spec_from_request(request)
        spec.profiles.extend(full_name("profiles", name) for name in profiles)
        if (named := checkpoint_of(model)) is not None:
            spec.model_name = named
        else:  # a file; if there is none, `load_model` raises with the nearest name
            found = load_model(model)
            spec.model_document.CopyFrom(_content(model, found, document_pb2.DOCUMENT_KIND_MODEL_SPEC))
        is_as_named = request.prefix_hit_rate is None and request.burstiness is None
        if is_as_named and (name := _workload_name(workload)) is not None:
            spec.workload_name = name
        else:
            traffic = load_workload(workload, prefix_hit_rate=request.hit_rate)
            if request.burstiness is not None:
                traffic = replace(traffic, burstiness=request.burstiness)
            spec.workload_document.CopyFrom(_content(workload, traffic, document_pb2.DOCUMENT_KIND_WORKLOAD))
        return spec


def _cluster_name(given: str) -> str:
    return full_name("clusters", id_of(load_cluster(given).name) if _is_file(given) else given)


def _workload_name(text: str) -> str | None:
    """Return the workload's name if the planner knows it, or None if the planner must be sent the document."""
    if _MEAN_LENGTHS.fullmatch(text):
        return text
    try:
        return find_workload(text).workload.name
    except UnknownNameError:
        return None


def _is_file(text: str) -> bool:
    """Return whether a text is a path rather than a name: it looks like one, or such a file exists."""
    return bool(text) and (text.endswith((".yaml", ".yml", ".json")) or Path(text).exists())


def _content(path: str, value: Value, kind: document_pb2.DocumentKind.ValueType) -> document_pb2.Document:
    return document_pb2.Document(kind=kind, content=dump(value, "json").encode("utf-8"), source_name=path[-255:])


# --- the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Applying:
    terminal: Terminal
    client: Client
    requested: options.ApplyOptions
    _done: list[tuple[Any, str]] = field(default_factory=list)  # resources and what was done to each

    def run(self, files: Sequence[str], problem: PlacementOptions) -> ExitCode:
        """Do everything, in the order of dependencies.

        Raises:
            DocumentError: a file is not usable; nothing was changed.
            CallError: the planner refused something.
        """
        refuse_unwritable(self.requested.out)
        problem.refuse_contradictions(self.requested.plan)
        # Read every file before the first call, so that a typo in the last one changes nothing.
        values = [(path, load(path)) for path in files if not path.startswith("plans/")]
        plans = [path for path in files if path.startswith("plans/")]
        values += problem.documents()
        imports = [(path, value) for path, value in values if isinstance(value, Plan)]
        if self.requested.plan is not None:
            imports.append((self.requested.plan, load_plan(self.requested.plan)))
        if len(imports) + len(plans) + problem.is_given > 1:
            raise typer.BadParameter("more than one plan: give only one of --model, --plan, a Plan file, or plans/NAME")
        self._refuse_what_needs_a_plan(is_new=bool(imports) or problem.is_given, is_any=bool(plans))
        if problem.is_given:
            self._refuse_what_needs_an_end()
        self._apply(values)
        if plans:
            plan = fetched(self.client, "plans", full_name("plans", plans[0]), basic=True)
            return self._put_in_force(plan, is_printed=self._save(plan))
        if imports:
            path, value = imports[0]
            imported = document(path, value, document_pb2.DOCUMENT_KIND_PLAN)
            return self._follow(plan_pb2.Plan(cluster=problem.cluster_of_plan(value), imported=imported))
        if problem.is_given:
            return self._follow(problem.plan())
        if not self._done:
            raise typer.BadParameter("nothing to apply: give files, --plan, or --cluster with --model and --workload")
        lines = "\n".join(f"{resource.name}  {what}" for resource, what in self._done)
        self.terminal.emit(lambda: list_data("Applied", [resource for resource, _ in self._done]), lambda: lines)
        return ExitCode.OK

    def _refuse_what_needs_a_plan(self, *, is_new: bool, is_any: bool) -> None:
        """Refuse options about a plan if there is none, or none that is new: they would be ignored."""
        requested, new = self.requested, "--model and --workload, or --plan"
        options.refuse_without(new, requested, "name", is_given=is_new)
        options.refuse_without(
            f"{new}, or plans/NAME", requested, "activate", "no_wait", "out", is_given=is_new or is_any
        )

    def _refuse_what_needs_an_end(self) -> None:
        """Refuse to activate or save, without waiting for its search, a plan that does not exist yet."""
        if not self.requested.no_wait:
            return
        for option, is_given in (("--activate", self.requested.activate), ("--out", self.requested.out is not None)):
            if is_given:
                raise typer.BadParameter(f"{option} needs the end of the search, for which --no-wait does not wait")

    def _apply(self, values: list[tuple[str, Value]]) -> None:
        dry_run = self.requested.dry_run
        for path, value in values:
            if isinstance(value, Plan):
                continue
            if not isinstance(value, Cluster | Profile):
                raise typer.BadParameter(f"{path} is a {type(value).__name__}, expected a Cluster, Profile or Plan")
            resource, what = apply_resource(self.client, path, value, dry_run=dry_run, may_rename=self.requested.rename)
            self._done.append((resource, what))
            self.terminal.say(f"{resource.name} {what}{' (dry run)' if dry_run else ''}")

    def _follow(self, wanted: plan_pb2.Plan) -> ExitCode:
        """Create a plan and take it as far as requested: wait for it, save it, activate it."""
        requested, terminal = self.requested, self.terminal
        request = plan_service_pb2.CreatePlanRequest(
            plan_id=requested.name, plan=wanted, validate_only=requested.dry_run
        )
        plan = self.client.plans.CreatePlan(request).plan
        if requested.dry_run:
            terminal.say(f"the planner would accept this plan; {self._not_done}")
            return self._show(plan)
        terminal.say(f"{plan.name} made")
        if plan.state != plan_pb2.PLAN_STATE_READY:
            if requested.no_wait:
                return self._show(plan)
            plan = wait_for_plan(terminal, self.client, plan.name, left=list(self._left(plan.name)))
        code, is_printed = outcome(terminal, self.client, plan), requested.out == STDOUT
        if code is ExitCode.OK and plan.state == plan_pb2.PLAN_STATE_CANCELLED:
            code = self._stopped_by_another(plan)
        if code is not ExitCode.OK:
            return code if is_printed else self._show(plan, code=code)
        self._save(plan)
        if requested.activate:
            return self._put_in_force(plan, is_printed=is_printed)
        return ExitCode.OK if is_printed else self._show(plan)

    def _left(self, plan: str) -> Iterator[str]:
        """Yield how to do what was asked for after the search, which the planner does not do by itself."""
        if self.requested.activate:
            yield f"activate it once it is solved: hetis-plan apply --activate {plan}"
        if self.requested.out is not None:
            yield f"save it once it is solved: hetis-plan apply {plan} --out FILE"

    def _stopped_by_another(self, plan: plan_pb2.Plan) -> ExitCode:
        """Tell that someone cancelled the search; whether its best plan is good enough is for a person to decide."""
        wishes = {"activated": self.requested.activate, "saved": self.requested.out}
        undone = [what for what, wish in wishes.items() if wish]
        self.terminal.error(
            f"the search for {plan.name} was cancelled: its best plan so far was kept"
            + (f", and not {' or '.join(undone)}" if undone else ""),
            [
                f"activate it nevertheless: hetis-plan apply --activate {plan.name}",
                f"save it: hetis-plan apply {plan.name} --out FILE",
            ],
        )
        return ExitCode.CONFLICT

    @property
    def _not_done(self) -> str:
        """What a check leaves undone, for messages."""
        return (
            "nothing was changed or saved" if self.requested.dry_run and self.requested.out else "nothing was changed"
        )

    def _save(self, plan: plan_pb2.Plan) -> bool:
        """Save the plan's document if requested. Return whether stdout has it, and is to have nothing else.

        Raises CallError: the plan has no document, or none yet.
        """
        out = self.requested.out
        if out is None or self.requested.dry_run:
            return False
        document = self.client.read_plan_document(plan.name).decode("utf-8")
        if out == STDOUT:
            self.terminal.write(document)
            return True
        write_atomically(out, document)
        self.terminal.say(f"saved {out}")
        return False

    def _put_in_force(self, plan: plan_pb2.Plan, *, is_printed: bool = False) -> ExitCode:
        """Activate a plan, or show what that would do. ``is_printed``: stdout has the plan, and nothing else."""
        only_checks = self.requested.dry_run or not self.requested.activate
        # Send the cluster's etag, so that a plan activated by another client in the meantime causes a conflict and is
        # not overwritten.
        cluster = fetched(self.client, "clusters", plan.cluster, basic=True)
        answer = self.client.plans.ActivatePlan(
            plan_service_pb2.ActivatePlanRequest(name=plan.name, cluster_etag=cluster.etag, validate_only=only_checks)
        )
        plan = answer.plan
        if only_checks:
            self.terminal.say(f"dry run: {self._not_done}; {cluster.active_plan or 'no plan'} is in force now")
            return ExitCode.OK if is_printed else self._show(plan, answer.steps)
        self.terminal.say(f"{plan.name} is being activated")
        if not self.requested.no_wait:
            plan = wait_for_plan(self.terminal, self.client, plan.name)
        if not is_printed:
            self._show(plan, answer.steps)
        return outcome(self.terminal, self.client, plan, activated=not self.requested.no_wait)

    def _show(self, plan: plan_pb2.Plan, steps: Any = (), *, code: ExitCode = ExitCode.OK) -> ExitCode:
        show_plan(self.terminal, plan, steps)
        return code
