"""The application: verbs, help, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hetis.commands.terminal import Terminal
from hetis.commands.verb import click_command, run_application, version_option
from hetis.formats.errors import DocumentError
from hetis.planner.cli import (
    changes,
    cluster,
    dispatch,
    export,
    files,
    fits,
    place,
    plans,
    sharing,
    simulate,
)
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.failures import report_failure
from hetis.planner.cli.parameters.defaults import default_files, default_map
from hetis.planner.cli.parameters.options import verb
from hetis.planner.cli.server import deleting, node_verbs, planner_verbs, traffic_verb, why

app = typer.Typer(
    name="hetis-plan",
    epilog=ExitCode.listed(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@verb()
def version(terminal: Terminal) -> ExitCode:
    """Print the versions of hetis and of the libraries that affect plans."""
    from hetis.planner.use_cases.record.versions import installed_versions

    versions = installed_versions()
    terminal.emit(lambda: versions, lambda: "\n".join(f"{name} {number}" for name, number in versions.items()))
    return ExitCode.OK


# Verbs by help panel, with examples: their text, or two command lines.
VERBS: dict[str, tuple[Any, ...]] = {
    "Plan": (
        (place.place, place.PLACE_EXAMPLES),
        (fits.fits, fits.FITS_EXAMPLES),
        (place.compare, place.COMPARE_EXAMPLES),
        (plans.explain, "explain plan.json", "explain plan.json -o wide"),
        (plans.report, plans.REPORT_EXAMPLES),
        (plans.check, "check plan.json", "check plan.json -o json"),
        (sharing.share, sharing.SHARE_EXAMPLES),
        (simulate.simulate, simulate.SIMULATE_EXAMPLES),
        (export.export, export.EXPORT_EXAMPLES),
    ),
    "Change": (
        (changes.what_if, changes.WHAT_IF_EXAMPLES),
        (changes.replan, changes.REPLAN_EXAMPLES),
        (changes.rehearse, changes.REHEARSE_EXAMPLES),
        (changes.diff, changes.DIFF_EXAMPLES),
    ),
    "One running stage": (
        (dispatch.dispatch, dispatch.DISPATCH_EXAMPLES),
        (dispatch.redispatch, dispatch.REDISPATCH_EXAMPLES),
    ),
    "With a planner": (
        (planner_verbs.apply, planner_verbs.APPLY_EXAMPLES),
        (planner_verbs.get, "get plans", "get plans/night -o json"),
        (planner_verbs.watch, "watch plans/night", "watch clusters/prod -o json"),
        (why.why, "why r-3", "why clusters/prod/replicas/r-3 -o json"),
        (planner_verbs.agents, "agents --cluster prod", "agents --cluster prod -o json"),
        (traffic_verb.traffic, traffic_verb.TRAFFIC_EXAMPLES),
        (planner_verbs.status, "status", "status -o json"),
        (export.upstreams, export.UPSTREAMS_EXAMPLES),
        (planner_verbs.rollback, "rollback --cluster prod", "rollback --cluster prod --dry-run"),
        (planner_verbs.cancel, "cancel plans/night", "cancel night"),
        (deleting.delete, deleting.DELETE_EXAMPLES),
        (node_verbs.drain, "drain gpu1", "drain gpu1 --cluster prod"),
        (node_verbs.undrain, "undrain gpu1", "undrain gpu1 --cluster prod"),
        (node_verbs.disconnect, "disconnect gpu1", "disconnect gpu1 --cluster prod"),
    ),
    "Files": (
        (files.init, "init", "init fleet"),
        (files.convert, files.CONVERT_EXAMPLES),
        (files.validate, "validate cluster.yaml", "validate examples/*.yaml"),
        (files.schema, "schema Cluster", "schema Plan > plan.schema.json"),
        (files.catalog, files.CATALOG_EXAMPLES),
    ),
    "This installation": ((version, "version", "version -o json"),),
}
for _panel, _verbs in VERBS.items():
    for _verb in _verbs:
        _function, *_examples = _verb
        if len(_examples) > 1:
            _examples = ["\n\n".join(["Examples:", *(f"  hetis-plan {one}" for one in _examples)])]
        app.command(rich_help_panel=_panel, epilog=_examples[0])(_function)
app.add_typer(cluster.cluster, rich_help_panel="Files")


@app.callback()
def hetis_plan(
    _version: Annotated[bool, version_option("hetis-plan")] = False,
) -> None:
    """Plan LLM serving on a mixed GPU fleet, with a proof of how good the plan is."""


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are printed on stderr."""
    return run_application(app, "hetis-plan", arguments, report_failure, defaults=lambda: _defaults_for(arguments))


def _defaults_for(arguments: Sequence[str]) -> dict[str, dict[str, Any]] | None:
    """Return the defaults for one command line. Where files of defaults are wrong, help and versions ignore them with a
    warning: they are needed to find out what is wrong.
    """
    try:
        return _defaults()
    except DocumentError as error:
        words = [*itertools.takewhile(lambda word: word != "--", arguments)]
        if words and words[0] != "version" and not {"-h", "--help", "--version"} & set(words):
            raise
        for problem in error.problems:
            print(f"warning: {problem}; defaults from files are ignored", file=sys.stderr)
        return None


def _defaults() -> dict[str, dict[str, Any]] | None:
    """Return the options that files of defaults set, by verb, or None if there are no such files."""
    try:
        folder = Path.cwd()
    except OSError:  # the current folder is gone
        return None
    if not default_files(folder):
        return None
    options = {
        verb: {
            option.removeprefix("--"): parameter
            for parameter in command.params
            for option in parameter.opts
            if option.startswith("--") and not option.startswith("--help")
        }
        for verb, command in _commands(click_command(app))
    }
    return default_map(options, folder)


def _commands(group: Any) -> Iterator[tuple[str, Any]]:
    """Yield every verb with its command; a verb of a group is named ``cluster.discover``."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name}.{inner}", one) for inner, one in _commands(command))
        else:
            yield name, command
