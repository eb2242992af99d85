"""``hetis-plan redispatch``: which head groups of running requests should move."""

from __future__ import annotations

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import stage_options as options
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.options import ProfilesOption


@verb()
def redispatch(
    terminal: Terminal,
    *,
    state: options.RequiredStateOption,
    profile: ProfilesOption = None,
    theta: options.ThetaOption = "50%",  # type: ignore[assignment]  # defaults go through the parser, too
    budget: options.BudgetOption = None,
    patience: options.PatienceOption = "25%",  # type: ignore[assignment]
    least_gain: options.LeastGainOption = "1%",  # type: ignore[assignment]
    ahead: options.AheadOption = 100,
    refill: options.RefillOption = None,
    explain: options.ExplainOption = False,
    out: options.StateOutOption = None,
    strict: options.ShortOption = False,
) -> ExitCode:
    """Find the moves of running head groups that pay, in an order that memory allows.

    Moves are found whether or not a trigger has fired; the report says which ones would make a running stage look.
    """
    import math

    from hetis.planner.cli.plan_files import refuse_unwritable, save
    from hetis.planner.report.dispatch_document import redispatch_document
    from hetis.planner.report.dispatch_words import explain_redispatch
    from hetis.planner.report.redispatch import render_redispatch
    from hetis.planner.use_cases.dispatch import RedispatchSettings, redispatch_stage
    from hetis.planner.use_cases.stage_sources import load_stage

    if out is not None:
        refuse_unwritable(out)
    loaded = load_stage(state, profiles=profile or ())
    options.announce_compilation(terminal)
    settings = RedispatchSettings(
        theta=theta,
        budget_bytes=math.inf if budget is None else budget,
        least_gain=least_gain,
        patience=patience,
        ahead_steps=ahead,
        refill_token_s=refill,
    )
    found = redispatch_stage(loaded, settings)
    sentences = explain_redispatch(found) if explain else None
    if out is not None:
        save(found.saved, out)
        terminal.say(f"saved {out}")
    terminal.emit(lambda: redispatch_document(found, sentences), lambda: render_redispatch(found, sentences))
    if strict and found.plan.short_after >= 1:
        terminal.error(f"{found.plan.short_after:,.0f} KV blocks stay short, or on draining devices")
        return ExitCode.MISSED
    return ExitCode.OK
