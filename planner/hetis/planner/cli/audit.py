"""``hetis-plan audit``: who changed what, when, and with what outcome."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server_verb import server_verb

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.planner.client import Client
    from hetis.v1 import audit_service_pb2


_FILTERS = "Filters"


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a moment: write it like 2027-01-31T00:00:00Z") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


MomentOption = Annotated[datetime | None, typer.Option(metavar="TIME", parser=_moment, rich_help_panel=_FILTERS)]


@server_verb()
def audit(
    terminal: Terminal,
    client: Client,
    *,
    caller: Annotated[str, typer.Option(help="Name of credentials.", rich_help_panel=_FILTERS)] = "",
    method: Annotated[str, typer.Option(help="Such as CreatePlan.", rich_help_panel=_FILTERS)] = "",
    resource: Annotated[
        str, typer.Option(help="What was changed, or the plan that was chosen.", rich_help_panel=_FILTERS)
    ] = "",
    outcome: Annotated[
        str, typer.Option(help="OK, REPEATED, or a reason such as ROLE.", rich_help_panel=_FILTERS)
    ] = "",
    since: MomentOption = None,
    until: MomentOption = None,
) -> ExitCode:
    """Show the planner's audit log, the oldest line first. Needs role admin.

    Lines of refusals stand for all of their kind within a minute. `hetis-planner audit --check` on the planner's
    machine says whether any line was changed.
    """
    from google.protobuf.timestamp_pb2 import Timestamp

    from hetis.v1 import audit_service_pb2

    request = audit_service_pb2.ListAuditedChangesRequest(
        page_size=500, caller=caller, method=method, resource=resource, outcome=outcome
    )
    for field, moment in ((request.since_time, since), (request.until_time, until)):
        if moment is not None:
            whole = Timestamp()
            whole.FromDatetime(moment.astimezone(UTC))
            field.CopyFrom(whole)
    lines = list(client.list_audited_changes(request))
    terminal.emit(lambda: {"kind": "AuditLog", "lines": [_data(line) for line in lines]}, lambda: _table(lines))
    return ExitCode.OK


def _time(line: audit_service_pb2.AuditedChange) -> str:
    return line.time.ToDatetime(UTC).isoformat(timespec="milliseconds")


def _data(line: audit_service_pb2.AuditedChange) -> dict[str, Any]:
    return {
        "number": line.number,
        "time": _time(line),
        "epoch": line.epoch,
        "caller": line.caller,
        "role": line.role,
        "method": line.method,
        "resource": line.resource,
        "request_id": line.request_id,
        "plan": line.plan,
        "outcome": line.outcome,
        "times": line.times,
        "hash": line.hash,
    }


def _table(lines: Sequence[audit_service_pb2.AuditedChange]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    if not lines:
        return Text("no lines", style="dim")
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for head in ("", "time (UTC)", "caller", "method", "resource", "plan", "outcome"):
        table.add_column(
            head,
            justify="left" if head else "right",
            overflow="fold",
            no_wrap=head not in ("caller", "resource", "plan"),
        )
    for line in lines:
        plan = line.plan if line.plan != line.resource else ""
        outcome = line.outcome + (f" ({line.times} times)" if line.times > 1 else "")
        texts = (line.caller, line.method, line.resource, plan)
        style = "" if line.outcome in ("OK", "REPEATED") else "red"
        moment = line.time.ToDatetime(UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(str(line.number), moment, *map(Text, texts), Text(outcome, style=style))
    return table
