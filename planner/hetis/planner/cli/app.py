"""The application: verbs, help, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hetis.formats.command_line.verb import run_application, version_printer
from hetis.planner.cli.agents import agents
from hetis.planner.cli.apply import APPLY_EXAMPLES, apply
from hetis.planner.cli.audit import audit
from hetis.planner.cli.cancel import cancel
from hetis.planner.cli.catalog import catalog
from hetis.planner.cli.check import check
from hetis.planner.cli.cluster import cluster
from hetis.planner.cli.compare import compare
from hetis.planner.cli.completion import completion
from hetis.planner.cli.convert import CONVERT_EXAMPLES, convert
from hetis.planner.cli.defaults import default_files, default_map
from hetis.planner.cli.diff import DIFF_EXAMPLES, diff
from hetis.planner.cli.disconnect import disconnect
from hetis.planner.cli.dispatch import dispatch
from hetis.planner.cli.doctor import doctor
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.explain import explain
from hetis.planner.cli.export import EXPORT_EXAMPLES, export
from hetis.planner.cli.fair import FAIR_EXAMPLES, fair
from hetis.planner.cli.get import get
from hetis.planner.cli.init import init
from hetis.planner.cli.layers import LAYERS_EXAMPLES, layers
from hetis.planner.cli.place import place
from hetis.planner.cli.redispatch import redispatch
from hetis.planner.cli.replan import REPLAN_EXAMPLES, replan
from hetis.planner.cli.report import REPORT_EXAMPLES, report
from hetis.planner.cli.rollback import rollback
from hetis.planner.cli.schema import schema
from hetis.planner.cli.share import SHARE_EXAMPLES, share
from hetis.planner.cli.simulate import simulate
from hetis.planner.cli.simulation_options import SIMULATE_EXAMPLES
from hetis.planner.cli.stage_options import DISPATCH_EXAMPLES, REDISPATCH_EXAMPLES
from hetis.planner.cli.status import status
from hetis.planner.cli.upstreams import UPSTREAMS_EXAMPLES, upstreams
from hetis.planner.cli.validate import validate
from hetis.planner.cli.version import version
from hetis.planner.cli.watch import watch
from hetis.planner.cli.what_if import WHAT_IF_EXAMPLES, what_if

_EPILOG = "Exit codes: " + " · ".join(f"{code.value} {code.meaning.partition(',')[0]}" for code in ExitCode)

app = typer.Typer(
    name="hetis-plan",
    help="Plan LLM serving on a mixed GPU fleet, with a proof of how good the plan is.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,  # the verb `completion` prints the script; nothing edits the user's shell files
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(rich_help_panel="Plan")(place)
app.command(rich_help_panel="Plan", epilog=LAYERS_EXAMPLES)(layers)
app.command(rich_help_panel="Plan")(compare)
app.command(rich_help_panel="Plan")(explain)
app.command(rich_help_panel="Plan", epilog=REPORT_EXAMPLES)(report)
app.command(rich_help_panel="Plan")(check)
app.command(rich_help_panel="Plan", epilog=FAIR_EXAMPLES)(fair)
app.command(rich_help_panel="Plan", epilog=SHARE_EXAMPLES)(share)
app.command(rich_help_panel="Plan", epilog=SIMULATE_EXAMPLES)(simulate)
app.command(rich_help_panel="Plan", epilog=EXPORT_EXAMPLES)(export)
app.command("what-if", rich_help_panel="Change", epilog=WHAT_IF_EXAMPLES)(what_if)
app.command(rich_help_panel="Change", epilog=REPLAN_EXAMPLES)(replan)
app.command(rich_help_panel="Change", epilog=DIFF_EXAMPLES)(diff)
app.command(rich_help_panel="One stage, while it serves", epilog=DISPATCH_EXAMPLES)(dispatch)
app.command(rich_help_panel="One stage, while it serves", epilog=REDISPATCH_EXAMPLES)(redispatch)
app.command(rich_help_panel="With a planner", epilog=APPLY_EXAMPLES)(apply)
app.command(rich_help_panel="With a planner")(get)
app.command(rich_help_panel="With a planner")(watch)
app.command(rich_help_panel="With a planner")(agents)
app.command(rich_help_panel="With a planner")(status)
app.command(rich_help_panel="With a planner", epilog=UPSTREAMS_EXAMPLES)(upstreams)
app.command(rich_help_panel="With a planner")(rollback)
app.command(rich_help_panel="With a planner")(cancel)
app.command(rich_help_panel="With a planner")(disconnect)
app.command(rich_help_panel="With a planner")(audit)
app.command(rich_help_panel="Files")(init)
app.add_typer(cluster, rich_help_panel="Files")
app.command(rich_help_panel="Files", epilog=CONVERT_EXAMPLES)(convert)
app.command(rich_help_panel="Files")(validate)
app.command(rich_help_panel="Files")(schema)
app.command(rich_help_panel="Files")(catalog)
app.command(rich_help_panel="This installation")(doctor)
app.command(rich_help_panel="This installation")(completion)
app.command(rich_help_panel="This installation")(version)


@app.callback()
def hetis_plan(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=version_printer("hetis-plan"), is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Plan LLM serving on a mixed GPU fleet, with a proof of how good the plan is."""


def main() -> NoReturn:
    """Run the ``hetis-plan`` command and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error has become a message on stderr."""
    if "_HETIS_PLAN_COMPLETE" in os.environ:  # the script printed by `completion` asks for words
        from typer.completion import completion_init  # type: ignore[attr-defined]  # imported there, not exported

        completion_init()
    return run_application(app, "hetis-plan", arguments, _report_failure, defaults=_defaults)


def _defaults() -> dict[str, dict[str, Any]] | None:
    """Return the options of every verb set by files of defaults, or None without such files."""
    try:
        folder = Path.cwd()
    except OSError:  # the current folder is gone
        return None
    if not default_files(folder):
        return None
    options = {
        verb: {
            option.removeprefix("--"): parameter.name
            for parameter in command.params
            for option in parameter.opts
            if option.startswith("--") and option != "--help"
        }
        for verb, command in _verbs(typer.main.get_command(app))
    }
    return default_map(options, folder)


def _verbs(group: Any) -> Iterator[tuple[str, Any]]:
    """Yield every verb with its command; those of a group as ``cluster.discover``."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name}.{inner}", one) for inner, one in _verbs(command))
        else:
            yield name, command


def _report_failure(error: Exception) -> int:
    from hetis.planner.cli.failures import report_failure  # only once something has failed

    return report_failure(error)
