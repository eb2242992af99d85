"""Waits for plans of a planner: for their searches and activations, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.searching import SparseLines, describe, news_on_stderr
from hetis.planner.cli.server.resource_views import is_searched, plan_summary, resource_data
from hetis.planner.cli.server.server_verb import fetched
from hetis.planner.client import CallError, Client
from hetis.planner.convert.names import word_of
from hetis.solver.budget import Progress
from hetis.v1 import (
    failure_pb2,
    plan_pb2,
)


def wait_for_plan(
    terminal: Terminal, client: Client, name: str, *, exists: bool = True, left: Sequence[str] = ()
) -> plan_pb2.Plan:
    """Wait until the plan can no longer change by itself.

    Args:
        terminal: for news.
        client: of the planner.
        name: the plan's.
        exists: whether the planner has reported the plan before.
        left: how to do what was asked for after the wait, for a user whom an error or Ctrl-C keeps from it.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the plan continues, and the user was shown how to return to it.
        CallError: the call failed, or the planner has been unreachable for too long; in the latter case a plan that the
            planner has reported continues, and the user was shown how to return to it.
    """
    was_seen = exists
    try:
        plain = SparseLines(terminal.say, line_of, state=_state_and_phase)
        with news_on_stderr(terminal, "asking the planner", line_of, plain) as news:
            search = _FollowedSearch()

            def tell(plan: plan_pb2.Plan) -> None:
                nonlocal was_seen
                was_seen = True
                if search.begins_again(plan):
                    terminal.say(f"the search for {name} begins again: the planner that ran it is gone")
                news(plan)

            ended = client.wait(name, on_change=tell)
    except (KeyboardInterrupt, CallError) as error:
        if was_seen and (isinstance(error, KeyboardInterrupt) or error.is_unreachable):
            terminal.say(f"{name} continues on the planner")
            terminal.say(f"  follow it: hetis-plan watch {name}")
            for how in (*left, f"cancel it: hetis-plan cancel {name}"):
                terminal.say(f"  {how}")
        raise
    if search.has_found and _has_no_plan(ended):
        terminal.say(f"the best plan so far of {name} is lost: its planner or solver ended before it was saved")
    return ended


def show_plan(terminal: Terminal, plan: plan_pb2.Plan, steps: Any = ()) -> None:
    """Print a plan, and the ``steps`` of its activation."""
    terminal.emit(lambda: resource_data(plan), lambda: plan_summary(plan, steps))


class _FollowedSearch:
    """A search whose planner may end. The next planner has its problem, but not what it had found."""

    def __init__(self) -> None:
        self._began_ns = 0  # when the search last seen began; 0 if it has not
        self.has_found = False  # whether a plan was found, by this planner or an earlier one

    def begins_again(self, plan: plan_pb2.Plan) -> bool:
        """Return whether the search that was seen before is not this one; its progress starts from nothing."""
        before, self._began_ns = self._began_ns, plan.solve_start_time.ToNanoseconds()
        self.has_found |= plan.progress.HasField("incumbent")
        return is_searched(plan) and before not in (0, self._began_ns)


def _has_no_plan(plan: plan_pb2.Plan) -> bool:
    return plan.state == plan_pb2.PLAN_STATE_CANCELLED and not plan.HasField("result")


def _state_and_phase(plan: plan_pb2.Plan) -> tuple[int, int, str]:
    """Return what is news at once when it changes."""
    phase, _, _ = plan.progress.phase.partition(",")  # the rest is the progress within the phase
    return plan.state, plan.activation, phase


def line_of(plan: plan_pb2.Plan) -> str:
    """Return the progress of a plan in one line."""
    if plan.state == plan_pb2.PLAN_STATE_QUEUED:
        return f"{plan.name} is waiting for a solver process"
    if plan.state == plan_pb2.PLAN_STATE_SOLVING:
        return describe(_progress(plan.progress), plan.progress.unit)
    if plan.activation != plan_pb2.ACTIVATION_STATE_INACTIVE and plan.HasField("activation_progress"):
        far = plan.activation_progress
        counts = (far.num_serving, far.num_starting, far.num_failed, far.num_draining)
        words = zip(counts, ("serve", "start", "failed", "drain"), strict=True)
        said = ", ".join(f"{count} {what}" for count, what in words if count)
        waits = f"; waits for {_awaited(far)}" if far.awaited_nodes else ""
        return f"{plan.name} {word_of(plan_pb2.ActivationState, plan.activation)}: {said or 'no replica yet'}{waits}"
    return f"{plan.name} {word_of(plan_pb2.PlanState, plan.state)}"


def _awaited(far: plan_pb2.ActivationProgress) -> str:
    """Return the nodes without which replicas cannot start: the first by name, and the number of the others."""
    named = list(far.awaited_nodes)
    others = far.num_awaited_nodes - len(named)
    return ", ".join(named) + (f" and {others:,} more node{'s' if others > 1 else ''}" if others > 0 else "")


def _progress(said: plan_pb2.SolveProgress) -> Progress:
    return Progress(
        phase=said.phase or "starting",
        elapsed_s=said.elapsed_s,
        incumbent=said.incumbent if said.HasField("incumbent") else None,
        bound=said.bound if said.HasField("bound") else None,
        gap=said.gap if said.HasField("gap") else None,
    )


def outcome(terminal: Terminal, client: Client, plan: plan_pb2.Plan, *, activated: bool = False) -> ExitCode:
    """Print the reason of a plan's outcome and return its exit code; ``activated``: activation was requested."""
    if plan.state == plan_pb2.PLAN_STATE_INFEASIBLE:
        terminal.error(f"no feasible plan exists ({plan.name})", [f"- {reason}" for reason in plan.infeasible_reasons])
        return ExitCode.INFEASIBLE
    if plan.state == plan_pb2.PLAN_STATE_FAILED:
        terminal.error(f"{plan.name} failed: {plan.failure.message} ({_reason(plan.failure)})")
        no_plan = plan.failure.reason == failure_pb2.ERROR_REASON_NO_PLAN_FOUND
        return ExitCode.NO_PLAN if no_plan else ExitCode.INTERNAL
    if _has_no_plan(plan):
        terminal.error(f"{plan.name} was cancelled and has no plan")
        return ExitCode.NO_PLAN
    if activated and plan.activation == plan_pb2.ACTIVATION_STATE_FAILED:
        failure = plan.activation_progress.failure
        terminal.error(
            f"{plan.name} could not be activated: {failure.message} ({_reason(failure)})",
            _ways_out(client, plan),
        )
        return ExitCode.INTERNAL
    if activated and plan.activation == plan_pb2.ACTIVATION_STATE_INACTIVE:
        terminal.error(f"{plan.name} is not in force: its activation was cancelled, or another plan was activated")
        return ExitCode.CONFLICT
    return ExitCode.OK


def _ways_out(client: Client, plan: plan_pb2.Plan) -> list[str]:
    """Return what to do about a plan whose activation failed."""
    try:
        earlier = fetched(client, "clusters", plan.cluster, basic=True).earlier_plan
    except CallError:  # the failure of the activation is what matters
        return ["see what is in force: hetis-plan status"]
    if earlier:
        return ["the plan that served before still serves", f"roll back: hetis-plan rollback {plan.name}"]
    again = f"activate another plan, or this one once the cause is gone: hetis-plan apply --activate {plan.name}"
    far = plan.activation_progress
    if far.num_serving or far.num_draining:
        return [again]
    return [again, f"withdraw it while nothing serves: hetis-plan cancel {plan.name}"]


def _reason(failure: failure_pb2.Failure) -> str:
    return failure_pb2.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
