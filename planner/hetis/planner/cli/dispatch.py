"""``hetis-plan dispatch``: on which devices the head groups of new requests should be placed."""

from __future__ import annotations

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import stage_options as options
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.options import ProfilesOption, SeedOption


@verb()
def dispatch(
    terminal: Terminal,
    *,
    state: options.StateOption = None,
    plan: options.PlanOption = None,
    replica: options.ReplicaOption = 0,
    stage: options.StageOption = 1,
    requests: options.RequestsOption = None,
    request: options.RequestOption = None,
    profile: ProfilesOption = None,
    exact: options.ExactOption = False,
    time_limit: options.ExactLimitOption = "10s",  # type: ignore[assignment]  # defaults go through the parser, too
    seed: SeedOption = 0,
    explain: options.ExplainOption = False,
    out: options.StateOutOption = None,
) -> ExitCode:
    """Place the head groups of new requests on the devices of one stage, and prove how good that is.

    The stage comes from a DispatchState file, or empty from a placement plan.

    Requests that find no room are listed with what they lack and the others placed; the exit code is 3 then.
    """
    import time

    from hetis.formats.errors import DocumentError
    from hetis.planner.cli.native_output import no_native_output
    from hetis.planner.cli.plan_files import refuse_unwritable, save
    from hetis.planner.cli.searching import run_interruptibly
    from hetis.planner.cli.stage_options import chosen_stage
    from hetis.planner.report.dispatch import render_dispatch
    from hetis.planner.report.dispatch_document import dispatch_document
    from hetis.planner.report.dispatch_words import explain_dispatch
    from hetis.planner.use_cases import dispatch as dispatching
    from hetis.planner.use_cases.stage_sources import load_new_requests
    from hetis.solver.budget import Budget

    if out is not None:
        refuse_unwritable(out)
    loaded = chosen_stage(terminal, state=state, plan=plan, replica=replica, stage=stage, profiles=profile or ())
    arrivals = load_new_requests(loaded, file=requests, words=request or ())
    options.announce_compilation(terminal)
    budget = Budget(time_limit_s=time_limit, clock=time.monotonic)
    with no_native_output():
        found = run_interruptibly(
            lambda: dispatching.dispatch_requests(loaded, arrivals, exact=exact, budget=budget, seed=seed),
            cancelled=budget.cancelled,
            on_cancel=lambda: terminal.say("stopping with the best placement so far; Ctrl-C again leaves at once"),
        )
    sentences = explain_dispatch(found) if explain else None
    saved = True
    if out is not None:
        # If this fails, print the answer all the same; the machine is to blame, not the input.
        try:
            save(found.saved, out)
            terminal.say(f"saved {out}")
        except DocumentError as error:
            saved = False
            terminal.error("the state was not saved", [str(problem) for problem in error.problems])
    terminal.emit(lambda: dispatch_document(found, sentences), lambda: render_dispatch(found, sentences))
    if not saved:
        return ExitCode.INTERNAL
    if budget.cancelled.is_set():
        return ExitCode.INTERRUPTED
    return ExitCode.INFEASIBLE if found.plan.unplaced else ExitCode.OK
