"""``hetis-plan share FILE``: one fleet, several models, a plan for each tenant."""

from __future__ import annotations

import contextlib
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import options
from hetis.planner.cli.dry_run import DryRunOption, say_what_would_be_solved
from hetis.planner.cli.exit_codes import ExitCode

SHARE_EXAMPLES = """Examples:\n
  hetis-plan share examples/three-models.yaml -c examples/fleet-160.yaml\n
  hetis-plan share examples/three-models.yaml -c examples/fleet-160.yaml --rule sharing-incentive --out plans"""


class ShareRule(StrEnum):
    """Rules by name; a test keeps this in step with `hetis.solver.tenants.problem.TenantRule`."""

    EFFICIENCY = "efficiency"
    EQUAL_THROUGHPUT = "equal-throughput"
    MAX_MIN = "max-min"
    SHARING_INCENTIVE = "sharing-incentive"


@verb()
def share(
    terminal: Terminal,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A Tenants file, or - for standard input.")],
    *,
    cluster: options.ClusterOption,
    profile: options.ProfilesOption = None,
    rule: Annotated[ShareRule, typer.Option("--rule", help="What everybody is owed.")] = ShareRule.MAX_MIN,
    others: Annotated[
        bool, typer.Option("--others/--no-others", help="Also share by the other rules, to compare.")
    ] = True,
    envy: Annotated[
        bool, typer.Option("--envy/--no-envy", help="Also place every tenant on the GPUs of every other.")
    ] = True,
    strategy: options.StrategyOption = options.DEFAULT_STRATEGY,
    time_limit: options.TimeLimitOption = "5min",  # type: ignore[assignment]  # defaults go through the parser, too
    gap: options.GapOption = "0.5%",  # type: ignore[assignment]
    seed: options.SeedOption = 0,
    threads: options.ThreadsOption = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            rich_help_panel="Result",
            show_default=False,
            help="Also save every tenant's plan there, as TENANT.json.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
) -> ExitCode:
    """Share one fleet among tenants with different models, and plan every tenant's replicas.

    A tenant's value is the rate its own replicas really reach, over what it would reach alone. Ctrl-C once shows and
    saves the best shares so far; twice leaves at once.
    """
    from hetis.planner.cli.failures import report_failure
    from hetis.planner.cli.plan_files import refuse_unwritable_plans, save_plans
    from hetis.planner.cli.searching import search_interruptibly
    from hetis.planner.report.tenants import render_tenants, tenants_document
    from hetis.planner.use_cases.place import Settings
    from hetis.planner.use_cases.share import load_tenancy, share_out_fleet
    from hetis.solver.budget import Budget
    from hetis.solver.errors import NoPlanFoundError
    from hetis.solver.tenants.problem import TenantRule

    loaded = load_tenancy(file, cluster=cluster, profiles=profile or (), strategy=strategy)
    if out is not None:
        with contextlib.suppress(OSError):  # reported below
            out.mkdir(exist_ok=True)
        refuse_unwritable_plans(out, [tenant.name for tenant in loaded.tenancy.tenants])
    if dry_run:
        given = zip(loaded.inputs, loaded.tenancy.tenants, strict=True)
        return say_what_would_be_solved(
            terminal, [(one.inputs, tenant.problem.objective) for one, tenant in given], strategies=[strategy],
            solves=1, time_limit_s=time_limit,
        )  # fmt: skip
    first = TenantRule(rule.value)
    rules = (first, *(other for other in TenantRule if other is not first and others))
    settings = Settings(strategy=strategy, time_limit_s=time_limit, gap_target=gap, seed=seed, threads=threads)
    cancelled = threading.Event()
    budget = Budget(time_limit_s=time_limit, clock=time.monotonic, cancelled=cancelled)
    try:
        found = search_interruptibly(
            terminal,
            lambda report: share_out_fleet(loaded, rules, settings, with_envy=envy, budget=budget, report=report),
            unit="of value",
            cancelled=cancelled,
            so_far="the best shares",
        )
    except NoPlanFoundError as error:
        return ExitCode.INTERRUPTED if cancelled.is_set() else report_failure(error, terminal)
    if out is not None:
        shares = found.answers[0].shares
        save_plans(terminal, out, {one.name: one.plan for one in shares if one.plan is not None})
        for one in shares:
            if one.plan is None:
                terminal.say(f"{one.name} has no replica under this rule: no plan saved")
    terminal.emit(lambda: tenants_document(found), lambda: render_tenants(found))
    return ExitCode.INTERRUPTED if cancelled.is_set() else ExitCode.OK
