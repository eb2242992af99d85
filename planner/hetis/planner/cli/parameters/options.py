"""Options of `hetis-plan`: how they are declared, and the ones that several verbs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from hetis.commands import groups
from hetis.commands import verb as command_line
from hetis.commands.groups import group as group
from hetis.commands.verb import verb as verb
from hetis.planner.cli.parameters import values

# Parsers by the form of a value.
_PARSERS: Mapping[str | None, Callable[[str], Any]] = {
    "BANDWIDTH": values.bandwidth,
    "SHARE": values.share,
    "SHARE|trace": values.prefix_hit_rate,
    "TIME": values.positive_duration,
}

PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file, or - for standard input.")]


def option(usage: str, default: Any = None, **more: Any) -> Any:
    """Declare a field of a group as an option, as `groups.option`; the form of its value says how it is read."""
    return groups.option(usage, default, **({"parser": _PARSERS.get(groups.form_of(usage))} | more))


def panel(name: str) -> Callable[..., Any]:
    """Return `option` for one panel of the help."""
    return partial(option, panel=name)


# --- options of several verbs, each of which has its own group

_search, _result, _plan = map(panel, ("Search", "Result", "Plan"))

out_option = partial(
    _result,
    "--out FILE: Also save the plan; .yaml or .yml for YAML, anything else is JSON; - prints it instead of the tables.",
)
html_option = partial(_result, "--html FILE: Also save a self-contained HTML page; see `report`.")
dry_run_option = partial(
    _search,
    "--dry-run: "
    "Check every file, name and option and whether the results can be written, show what would be solved, and stop.",
    False,
)

no_wait_option = partial(option, "--no-wait: Return at once; `watch` shows the progress.", False)
check_only_option = partial(option, "--dry-run: Check and show everything without changing anything.", False)


# --- groups of several verbs


@group
class ApplyOptions:
    plan: str | None = _plan("--plan FILE: Import a Plan file instead.")
    name: str = _plan("--name ID: Name of the new plan.", "", shown="chosen by the planner")
    activate: bool = _plan("--activate: Put the plan in force and wait until it is.", False)
    out: Path | None = _plan("--out FILE: Save the Plan as JSON; - prints it instead of the tables.")
    rename: bool = option("--rename: Replace a cluster of another name that has the same id.", False)
    no_wait: bool = no_wait_option()
    dry_run: bool = check_only_option()


def refuse_without(needed: str, kind: Any, *names: str, is_given: bool) -> None:
    """Refuse options of a group, the fields of these names or all, that would be ignored without another one.

    Those with their defaults are not refused, nor those that a file of defaults or the environment sets. Raises
    typer.BadParameter.
    """
    for name, option in given_in(kind).items():
        is_default = getattr(kind, name) == getattr(type(kind), name)
        if not (is_given or is_default) and (name in names or not names):
            raise typer.BadParameter(f"{option} needs {needed}")


def spelled(name: str) -> str:
    """Return a field's option as users write it."""
    return f"--{name.replace('_', '-')}"


def given_in(*groups_of_options: Any, renamed: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return the options of groups that have values from the command line, by their fields.

    ``renamed`` are the parameters of fields with other names.
    """
    given = command_line.given.get()
    named = (one for kind in groups_of_options for one in fields(kind) if renamed.get(one.name, one.name) in given)
    return {one.name: groups.names_of(one.metadata["option"]["usage"])[0] for one in named}
