"""``hetis-plan share``: one fleet planned for several models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli import outputs
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.failures import report_no_plan
from hetis.planner.cli.parameters import options
from hetis.planner.cli.parameters.options import group, option, verb
from hetis.planner.cli.parameters.requests import requested
from hetis.planner.cli.searching import Interruptible
from hetis.planner.use_cases.request import RungName
from hetis.solver.budget import Report
from hetis.solver.errors import NoPlanFoundError

SHARE_EXAMPLES = """Examples:\n
  hetis-plan share examples/three-models.yaml -c examples/fleet-160.yaml\n
  hetis-plan share examples/three-models.yaml -c examples/fleet-160.yaml --rule sharing-incentive --out plans"""


# A test keeps these in step with `TenantRule` of the solver, which is slow to import.
ShareRule = Literal["efficiency", "equal-throughput", "max-min", "sharing-incentive"]


@group
class ShareOptions:
    cluster: str = requested("cluster")
    profile: list[str] | None = requested("profiles")
    rule: ShareRule = option("--rule: Fairness rule.", "max-min")
    others: bool = option("--others/--no-others: Also share by the other rules for comparison.", True)
    oef: bool = option(
        "--oef: Also show OEF's shares, from one speed-up per GPU type, at the rates that they reach.", False
    )
    strategy: str = requested("strategy")
    engine: str | None = requested("engine")
    rung: RungName | None = requested("rung")
    time_limit: float = requested("time_limit", default="5min", shown=True)
    gap: float = requested("gap", default="0.5%")
    seed: int = requested("seed")
    out: Path | None = option(
        "--out FOLDER: Also save every tenant's plan there, as TENANT.json; created if missing.", panel="Result"
    )
    dry_run: bool = options.dry_run_option()


@verb()
def share(
    terminal: Terminal,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A Tenants file, or - for standard input.")],
    *,
    options: ShareOptions,
) -> ExitCode:
    """Share one fleet among tenants with different models, and plan every tenant's replicas.

    A tenant's value is the rate that its replicas reach, divided by the rate it would reach alone. Ctrl-C once shows
    and saves the best shares so far; Ctrl-C twice exits at once.
    """
    from hetis.planner.export.carrying import not_carried
    from hetis.planner.report.sharing import render_tenants, tenants_document
    from hetis.planner.use_cases.placement_settings import PlacementSettings
    from hetis.planner.use_cases.sharing import SharedFleet, load_tenancy, share_out_fleet
    from hetis.planner.use_cases.sources import engine_rules
    from hetis.solver.tenants.tenancy import TenantRule

    out = options.out
    settings = PlacementSettings(
        strategy=options.strategy, engine=engine_rules(options.engine, options.strategy),
        time_limit_s=options.time_limit, gap_target=options.gap, seed=options.seed, rung=options.rung or "",
    )  # fmt: skip
    loaded = load_tenancy(file, cluster=options.cluster, profiles=options.profile or (), settings=settings)
    outputs.refuse_unwritable_plans(out, [tenant.name for tenant in loaded.tenancy.tenants])
    if options.dry_run:
        given = zip(loaded.inputs, loaded.tenancy.tenants, strict=True)
        return outputs.say_what_would_be_solved(
            terminal, [(one.inputs, tenant.problem.objective) for one, tenant in given], strategies=[options.strategy],
            time_limit_s=options.time_limit,
        )  # fmt: skip
    first = TenantRule(options.rule)
    rules = (first, *(other for other in TenantRule if other is not first and options.others))
    long = Interruptible(terminal, time_limit_s=options.time_limit)

    def work(report: Report) -> SharedFleet:
        return share_out_fleet(
            loaded, rules, settings, with_oef=options.oef, budget=long.budget(), report=report, carriers=not_carried
        )

    try:
        found = long.search(work, unit="of value", so_far="the best shares")
    except NoPlanFoundError as error:
        return report_no_plan(error, terminal, interrupted=long.cancelled.is_set())
    if out is not None:
        shares = found.answers[0].shares
        outputs.save_plans(terminal, out, {one.name: one.plan for one in shares if one.plan is not None})
        for one in shares:
            if one.plan is None:
                terminal.say(f"{one.name} has no replica under this rule: no plan was saved for it")
    terminal.emit(lambda: tenants_document(found), lambda: render_tenants(found))
    return long.code()
