"""``hetis-plan share FILE``: one fleet, several models, a plan for each tenant."""

from __future__ import annotations

import contextlib
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import options
from hetis.planner.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from hetis.solver.tenants.result import FleetShares

SHARE_EXAMPLES = """Examples:\n
  hetis-plan share examples/three-models.yaml -c examples/fleet-160.yaml\n
  hetis-plan share examples/three-models.yaml -c examples/fleet-160.yaml --rule sharing-incentive --out plans"""


class ShareRule(StrEnum):
    """Rules by name; a test keeps this in step with `hetis.solver.tenants.result.TenantRule`."""

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
) -> ExitCode:
    """Share one fleet among tenants with different models, and plan every tenant's replicas.

    A tenant's value is the rate its own replicas really reach, over what it would reach alone. Ctrl-C once shows and
    saves the best shares so far; twice leaves at once.
    """
    from hetis.planner.cli.failures import report_failure
    from hetis.planner.cli.native_output import no_native_output
    from hetis.planner.cli.progress import progress_on_stderr
    from hetis.planner.placing import Settings
    from hetis.planner.report.tenants import render_tenants, tenants_document
    from hetis.planner.solving import run_interruptibly
    from hetis.planner.tenancy import load_tenancy, share_out_fleet
    from hetis.solver.budget import Budget
    from hetis.solver.errors import NoPlanFoundError
    from hetis.solver.tenants.result import TenantRule

    loaded = load_tenancy(file, cluster=cluster, profiles=profile or (), strategy=strategy)
    if out is not None:
        _refuse_unwritable(out, [tenant.name for tenant in loaded.tenancy.tenants])
    first = TenantRule(rule.value)
    rules = (first, *(other for other in TenantRule if other is not first and others))
    settings = Settings(strategy=strategy, time_limit_s=time_limit, gap_target=gap, seed=seed, threads=threads)
    cancelled = threading.Event()
    budget = Budget(time_limit_s=time_limit, clock=time.monotonic, cancelled=cancelled)
    with no_native_output(), progress_on_stderr(terminal, "of value") as report:
        try:
            found = run_interruptibly(
                lambda: share_out_fleet(loaded, rules, settings, with_envy=envy, budget=budget, report=report),
                cancelled=cancelled,
                on_cancel=lambda: terminal.say("stopping with the best shares so far; Ctrl-C again leaves at once"),
            )
        except NoPlanFoundError as error:
            return ExitCode.INTERRUPTED if cancelled.is_set() else report_failure(error, terminal)
    if out is not None:
        _save_plans(terminal, found.answers[0], out)
    terminal.emit(lambda: tenants_document(found), lambda: render_tenants(found))
    return ExitCode.INTERRUPTED if cancelled.is_set() else ExitCode.OK


def _plan_file(folder: Path, tenant: str) -> Path:
    return folder / f"{tenant}.json"


def _refuse_unwritable(folder: Path, tenants: list[str]) -> None:
    from hetis.planner.cli.plan_files import refuse_unwritable

    with contextlib.suppress(OSError):  # what stands in the way is told below
        folder.mkdir(exist_ok=True)
    for tenant in tenants:
        refuse_unwritable(_plan_file(folder, tenant))


def _save_plans(terminal: Terminal, answer: FleetShares, folder: Path) -> None:
    from hetis.planner.cli.plan_files import save

    for one in answer.shares:
        if one.plan is not None:
            path = _plan_file(folder, one.name)
            save(one.plan, path)
            terminal.say(f"saved {path}")
        else:
            terminal.say(f"{one.name} has no replica under this rule: no plan saved")
