"""``hetis-plan dispatch`` and ``redispatch``: head groups of one stage, while it serves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.parameters import options, values
from hetis.planner.cli.parameters.options import group, panel, verb
from hetis.planner.cli.parameters.requests import requested

if TYPE_CHECKING:
    from hetis.planner.use_cases.dispatch.stages import CostedStage

DISPATCH_EXAMPLES = """Examples:\n
hetis-plan dispatch --state examples/dispatch/a100-l4.yaml --request 8000/300\n
hetis-plan dispatch --plan plan.json --request 8000/300"""
REDISPATCH_EXAMPLES = """Examples:\n
hetis-plan redispatch --state examples/dispatch/drifted.yaml\n
hetis-plan redispatch --state examples/dispatch/draining.yaml --budget 10GiB"""
_input, _search, _result = map(panel, ("Inputs", "Search", "Result"))


@group
class RequestOptions:
    state: str | None = _input("--state FILE: A DispatchState file; - is stdin.")
    plan: str | None = _input("--plan PLAN: Instead of --state: take one idle stage of a placement plan.")
    replica: int = _input("--replica: Replica of the plan, counted from 0.", 0, min=0)
    stage: int = _input("--stage: Stage of that replica, counted from 1.", 1, min=1)
    requests: str | None = _input("--requests FILE: New requests: a DispatchRequests file.")
    request: list[str] | None = _input(
        "--request CONTEXT/OUTPUT: A new request by its token counts, such as 8000/300; repeatable."
    )
    profile: list[str] | None = requested("profiles")

    def load(self) -> CostedStage:
        """Load the stage from the state file or the plan, whichever was specified.

        Raises:
            BadParameter: neither or both were specified.
            DocumentError: the file is not usable.
        """
        from hetis.planner.use_cases.dispatch.stages import load_stage, load_stage_of_plan

        if (self.state is None) == (self.plan is None):
            raise typer.BadParameter("give one of --state and --plan")
        if self.state is not None:
            return load_stage(self.state, profiles=self.profile or ())
        assert self.plan is not None
        options.refuse_without("--state: a plan already contains its profiles", self, "profile", is_given=False)
        return load_stage_of_plan(self.plan, replica=self.replica, stage=self.stage)


@verb()
def dispatch(terminal: Terminal, *, given: RequestOptions) -> ExitCode:
    """Place the head groups of new requests on the devices of one stage, with a bound on the optimum.

    The stage comes from a DispatchState file, or is taken empty from a placement plan.

    Requests that find no room are listed with what they lack and the others placed; the exit code is 3 then.
    """
    from hetis.planner.report.dispatch import dispatch_document, render_dispatch
    from hetis.planner.use_cases.dispatch.answers import dispatch_requests
    from hetis.planner.use_cases.dispatch.stages import load_new_requests

    loaded = given.load()
    arrivals = load_new_requests(loaded, file=given.requests, words=given.request or ())
    announce_compilation(terminal)
    found = dispatch_requests(loaded, arrivals)
    terminal.emit(lambda: dispatch_document(found), lambda: render_dispatch(found))
    return ExitCode.INFEASIBLE if found.plan.unplaced else ExitCode.OK


def announce_compilation(terminal: Terminal) -> None:
    """Explain why the first run on a machine takes a minute."""
    from hetis.planner.use_cases.dispatch.answers import is_compiled

    if not is_compiled():
        terminal.say("compiling the solver (only once; takes a minute or two)")


# --- redispatch


@group
class RedispatchOptions:
    state: str = _input("--state FILE: A DispatchState file; - is stdin.", ...)
    profile: list[str] | None = requested("profiles")
    theta: float = _search(
        "--theta SHARE: Deviation from the ideal makespan that triggers a re-dispatch.", "50%", parser=values.ratio
    )
    budget: int | None = _search(
        "--budget SIZE: Maximum KV to move, such as 10GiB.", parser=values.size, shown="no limit"
    )
    patience: float = _search(
        "--patience SHARE: A move must pay within this share of its request's remaining steps.", "25%"
    )
    least_gain: float = _search(
        "--least-gain SHARE: Minimum gain, as a share of the makespan; below it nothing moves unless memory is short.",
        "1%",
        parser=values.ratio,
    )
    ahead: int = _search("--ahead: Decode steps to look ahead for KV growth.", 100, min=0, max=10**6)
    refill: float | None = _search(
        "--refill TIME: Time to prefill one token of an evicted request again.", shown="400us"
    )
    strict: bool = _result(
        "--strict: Exit 5 if devices remain short of KV blocks or draining devices still hold some.", False
    )


@verb()
def redispatch(terminal: Terminal, *, given: RedispatchOptions) -> ExitCode:
    """Find the moves of running head groups that pay off, in an order that memory allows.

    Moves are found whether or not a trigger has fired; the report lists the triggers that have fired.
    """
    from hetis.planner.report.dispatch import redispatch_document, render_redispatch
    from hetis.planner.use_cases.dispatch.answers import redispatch_stage
    from hetis.planner.use_cases.dispatch.stages import load_stage

    loaded = load_stage(given.state, profiles=given.profile or ())
    announce_compilation(terminal)
    found = redispatch_stage(
        loaded,
        theta=given.theta,
        budget_bytes=math.inf if given.budget is None else given.budget,
        least_gain=given.least_gain,
        patience=given.patience,
        ahead_steps=given.ahead,
        refill_token_s=given.refill,
    )
    terminal.emit(lambda: redispatch_document(found), lambda: render_redispatch(found))
    if given.strict and found.plan.short_after >= 1:
        terminal.error(f"{found.plan.short_after:,.0f} KV blocks remain short or on draining devices")
        return ExitCode.MISSED
    return ExitCode.OK
