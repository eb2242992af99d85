"""The verb ``delete``: several resources of the planner, each by a call of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.commands.terminal import WIDE, Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.failures import report_call_failure
from hetis.planner.cli.parameters import options
from hetis.planner.cli.parameters.options import group, option
from hetis.planner.cli.server.server_verb import called, collection, full_name, server_verb

if TYPE_CHECKING:
    from hetis.planner.client import Client

DELETE_EXAMPLES = """Examples:\n
  hetis-plan delete plans night day\n
  hetis-plan delete plans/night clusters/paper profiles/l4\n
  hetis-plan delete cluster paper --dry-run"""

DELETABLE = ("clusters", "plans", "profiles")  # agents and plans in force decide what else there is
# Statuses of refusals that concern one resource. After any other, the next call would fail, too.
_OF_ONE = ("NOT_FOUND", "FAILED_PRECONDITION", "ABORTED", "PERMISSION_DENIED", "INVALID_ARGUMENT")
# Reasons that do not say that nothing was changed. None: gRPC retries, and even if the connection was refused at last,
# an earlier attempt may have been carried out.
_MAY_BE_DONE = ("", "INTERNAL")


@group
class DeleteOptions:
    ignore_not_found: bool = option("--ignore-not-found: A resource that does not exist is no error.", False)
    dry_run: bool = options.check_only_option()


@server_verb()
def delete(
    terminal: Terminal,
    client: Client,
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="KIND NAME",
            help=f"A kind ({', '.join(DELETABLE)}) and names, or full names.",
        ),
    ],
    *,
    how: DeleteOptions,
) -> ExitCode:
    """Delete resources: clusters with all their plans, plans that are not in force, profiles.

    Plans need role orchestrator, clusters and profiles role admin. A resource that is refused does not keep the others
    from being deleted; the exit code is that of the first refusal. 2: it does not exist, or the role is missing. 7: it
    is in use. 6, also after refusals: the planner is unreachable or busy, and nothing more was tried; what may have
    been deleted without an answer is named. --dry-run also lists the plans that a cluster would take with it.
    """
    from hetis.planner.client import CallError

    left = _names(what)
    deleted, refused = list[str](), list[CallError]()
    is_in_doubt = True  # if Ctrl-C ends a call
    try:
        while left:
            try:
                called(client, "Delete", collection(left[0]), name=left[0], validate_only=how.dry_run)
            except CallError as error:
                if error.code.name not in _OF_ONE:
                    is_in_doubt = error.reason in _MAY_BE_DONE or error.metadata.get("changed") == "unknown"
                    raise
                if error.reason != "NOT_FOUND" or not how.ignore_not_found:
                    refused.append(error)
            else:
                with_it = _plans_of(client, left[0]) if how.dry_run else []
                deleted += [name for name in (*with_it, left[0]) if name not in deleted]
            left.pop(0)
    finally:  # also after an error or Ctrl-C: what is gone must be known
        if deleted or not (refused or left):
            _show(terminal, deleted, dry_run=how.dry_run)
        if how.dry_run:
            terminal.say("dry run: nothing was changed")
        codes = [report_call_failure(terminal, error) for error in refused]
        if left and is_in_doubt and not how.dry_run:
            terminal.warn(f"no answer came: {left[0]} may have been deleted")
        if left[1:]:
            terminal.warn(f"not tried: {', '.join(left[1:])}")
    return codes[0] if codes else ExitCode.OK


def _names(words: Sequence[str]) -> list[str]:
    """Return the full names, each once: words after a kind are of this kind. Raises typer.BadParameter.

    Clusters are last: each takes its plans with it, which would then no longer exist.
    """
    kind = None if "/" in words[0] else _deletable(words[0])
    named = words if kind is None else words[1:]
    if not named:
        raise typer.BadParameter(f"names of {kind} are missing, such as {kind}/NAME")
    found = list[str]()
    for word in named:
        if "/" not in word and kind is None:
            raise typer.BadParameter(f"{word!r} has no kind: write plans/{word}, or the kind before all names")
        own = _deletable(word) if "/" in word else kind
        if own is None or kind not in (None, own):
            raise typer.BadParameter(f"{word!r} is none of the {kind}")
        found.append(full_name(own, word))
    return sorted(dict.fromkeys(found), key=lambda name: name.startswith("clusters/"))


def _plans_of(client: Client, name: str) -> list[str]:
    """Return the plans that are deleted with a resource: those of a cluster."""
    return [plan.name for plan in client.list_plans(cluster=name)] if name.startswith("clusters/") else []


def _deletable(text: str) -> str:
    """Return the kind of a kind or full name. Raises typer.BadParameter."""
    try:
        kind = collection(text)
    except typer.BadParameter:
        such = (
            f"neither a kind ({', '.join(DELETABLE)}) nor a full name such as plans/{'NAME' if '/' in text else text}"
        )
        raise typer.BadParameter(f"{text!r} is {such}") from None
    if kind not in DELETABLE:
        raise typer.BadParameter(f"{kind} cannot be deleted, only {', '.join(DELETABLE)}")
    return kind


def _show(terminal: Terminal, deleted: Sequence[str], *, dry_run: bool) -> None:
    done = "would be deleted" if dry_run else "deleted"
    terminal.emit(
        lambda: {"apiVersion": "hetis/v1", "kind": "Deleted", "items": [{"name": name} for name in deleted]},
        lambda: "\n".join(f"{name}  {done}" for name in deleted) or "nothing to delete",
        width=WIDE,
    )
