"""The steps of ``apply``: documents, then a plan, then its activation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from google.protobuf.message import Message

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.documents import load, load_plan
from hetis.formats.files import write_atomically
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.goal import Goal
from hetis.planner.cli.plan_files import refuse_unwritable
from hetis.planner.cli.putting import Put, document, put_cluster, put_profile
from hetis.planner.cli.resource_data import list_data, resource_data
from hetis.planner.cli.resource_names import full_name
from hetis.planner.cli.resource_tables import plan_summary
from hetis.planner.cli.waiting import outcome, wait_for_plan
from hetis.planner.client import Client
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Plan
from hetis.solver.profile import Profile
from hetis.v1 import cluster_service_pb2, document_pb2, plan_pb2, plan_service_pb2, view_pb2

__all__ = ["Application", "Goal"]
_WITH_ANSWER = (plan_pb2.PLAN_STATE_READY,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """One run of ``apply``.

    Attributes:
        activate: put the plan in force.
        wait: wait until the search is over, and until the plan is in force.
        dry_run: check everything, change nothing.
        plan_id: id of a new plan; empty: the planner chooses.
        out: where to save the plan's document.
    """

    terminal: Terminal
    client: Client
    activate: bool
    wait: bool
    dry_run: bool
    plan_id: str
    out: Path | None
    _done: list[Put] = field(default_factory=list)

    def run(self, *, files: tuple[str, ...], goal: Goal, plan_file: str | None) -> ExitCode:
        """Do everything, in the order of dependencies.

        Raises:
            DocumentError: a file is not usable; nothing was changed.
            CallError: the planner refused something.
        """
        if self.out is not None:
            refuse_unwritable(self.out)
        goal.refuse_contradictions(plan_file)
        # Read every file before the first call, so that a typing error in the last one changes nothing.
        values = [(path, load(path)) for path in files if not path.startswith("plans/")]
        plans = [path for path in files if path.startswith("plans/")]
        values += goal.documents()
        imports = [(path, value) for path, value in values if isinstance(value, Plan)]
        if plan_file is not None:
            imports.append((plan_file, load_plan(plan_file)))
        if len(imports) + len(plans) + goal.solves > 1:
            raise typer.BadParameter("one plan at a time: one of --model, --plan, a Plan file, or plans/NAME")
        self._put(values)
        if plans:
            return self._put_in_force(self._read(plans[0]))
        if imports:
            return self._follow(self._imported(*imports[0], goal))
        if goal.solves:
            return self._follow(self._create(goal.plan(self.client)))
        if not self._done:
            raise typer.BadParameter("nothing to apply: files, --plan, or --cluster, --model and --workload")
        self.terminal.emit(lambda: list_data("Applied", [put.resource for put in self._done]), self._table)
        return ExitCode.OK

    def _put(self, values: list[tuple[str, Any]]) -> None:
        for path, value in values:
            if isinstance(value, Cluster):
                done = put_cluster(self.client, path, value, dry_run=self.dry_run)
            elif isinstance(value, Profile):
                done = put_profile(self.client, path, value, dry_run=self.dry_run)
            elif isinstance(value, Plan):
                continue
            else:
                raise typer.BadParameter(f"{path} is a {type(value).__name__}, expected a Cluster, Profile or Plan")
            self._done.append(done)
            self.terminal.say(f"{done.resource.name} {done.what}{' (dry run)' if self.dry_run else ''}")

    def _table(self) -> Any:
        from rich.text import Text

        return Text("\n".join(f"{put.resource.name}  {put.what}" for put in self._done))

    # --- a plan

    def _imported(self, path: str, value: Plan, goal: Goal) -> plan_pb2.Plan:
        wanted = plan_pb2.Plan(
            cluster=goal.cluster_of_plan(self.client, value),
            imported=document(path, value, document_pb2.DOCUMENT_KIND_PLAN),
        )
        return self._create(wanted)

    def _create(self, wanted: plan_pb2.Plan) -> plan_pb2.Plan:
        request = plan_service_pb2.CreatePlanRequest(plan_id=self.plan_id, plan=wanted, validate_only=self.dry_run)
        made = self.client.plans.CreatePlan(request).plan
        self.terminal.say(
            "the planner would take this plan; nothing was changed" if self.dry_run else f"{made.name} made"
        )
        return made

    def _follow(self, plan: plan_pb2.Plan) -> ExitCode:
        """Take a created plan as far as requested: wait for it, save it, put it in force."""
        if self.dry_run:
            return self._show(plan)
        if not self.wait and plan.state not in _WITH_ANSWER:
            if self.activate or self.out:
                self.terminal.warn("its search is not over: it was neither activated nor saved")
            return self._show(plan)
        if plan.state not in _WITH_ANSWER:
            plan = wait_for_plan(self.terminal, self.client, plan.name)
        code = outcome(self.terminal, plan)
        if code is not ExitCode.OK:
            self._show(plan)
            return code
        self._save(plan)
        return self._put_in_force(plan) if self.activate else self._show(plan)

    def _put_in_force(self, plan: plan_pb2.Plan) -> ExitCode:
        # With the cluster's etag, so that a plan activated by somebody else meanwhile is a conflict and not
        # overwritten.
        named = cluster_service_pb2.GetClusterRequest(name=plan.cluster, view=view_pb2.VIEW_BASIC)
        cluster = self.client.clusters.GetCluster(named).cluster
        answer = self.client.plans.ActivatePlan(
            plan_service_pb2.ActivatePlanRequest(
                name=plan.name, cluster_etag=cluster.etag, validate_only=self.dry_run or not self.activate
            )
        )
        plan = answer.plan
        if self.dry_run or not self.activate:
            self.terminal.say(f"this is what --activate would do; {cluster.active_plan or 'no plan'} is in force now")
            return self._show(plan, answer.steps)
        self.terminal.say(f"{plan.name} is put in force")
        if self.wait:
            plan = wait_for_plan(self.terminal, self.client, plan.name)
        self._show(plan, answer.steps)
        return outcome(self.terminal, plan, activated=self.wait)

    def _read(self, name: str) -> plan_pb2.Plan:
        request = plan_service_pb2.GetPlanRequest(name=full_name("plans", name), view=view_pb2.VIEW_BASIC)
        return self.client.plans.GetPlan(request).plan

    def _save(self, plan: plan_pb2.Plan) -> None:
        if self.out is not None:
            write_atomically(self.out, self.client.read_plan_document(plan.name).decode("utf-8"))
            self.terminal.say(f"saved {self.out}")

    def _show(self, plan: plan_pb2.Plan, steps: Any = ()) -> ExitCode:
        shown: Message = plan
        self.terminal.emit(lambda: resource_data(shown), lambda: plan_summary(plan, steps))
        return ExitCode.OK
