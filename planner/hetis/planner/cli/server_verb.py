"""The common part of all verbs that talk to a planner: its address, credentials, and failed calls as messages."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec

import typer

from hetis.formats.command_line.terminal import OutputFormat, Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from hetis.planner.client import Client, Connection

P = ParamSpec("P")

DEFAULT_SERVER = "127.0.0.1:8470"  # where hetis-planner listens by default
_PANEL = "Planner"

ServerOption = Annotated[
    str,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        envvar="HETIS_SERVER",
        rich_help_panel=_PANEL,
        help="The planner; several with commas.",
    ),
]
CaOption = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        metavar="FILE",
        envvar="HETIS_CA",
        rich_help_panel=_PANEL,
        help="Authority of its certificate; those of the system unless given. Only this machine goes without TLS.",
    ),
]
CertOption = Annotated[
    Path | None,
    typer.Option("--cert", metavar="FILE", envvar="HETIS_CERT", rich_help_panel=_PANEL, help="Own certificate."),
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", envvar="HETIS_KEY", rich_help_panel=_PANEL, help="Its key.")
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file", metavar="FILE", envvar="HETIS_TOKEN_FILE", rich_help_panel=_PANEL, help="Bearer token."
    ),
]
_SHARED: dict[str, tuple[Any, Any]] = {
    "server": (ServerOption, DEFAULT_SERVER),
    "ca": (CaOption, None),
    "cert": (CertOption, None),
    "key": (KeyOption, None),
    "token_file": (TokenFileOption, None),
}


def server_verb(
    *, prints_data: bool = True, output: OutputFormat = OutputFormat.TABLE
) -> Callable[[Callable[Concatenate[Terminal, Client, P], ExitCode]], Callable[..., None]]:
    """Turn ``f(terminal, client, ...) -> ExitCode`` into a typer command, as `verb` does without the client."""

    def decorate(function: Callable[Concatenate[Terminal, Client, P], ExitCode]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[2:]
        names = {parameter.name for parameter in own}

        @functools.wraps(function)
        def with_client(terminal: Terminal, *_: Any, **kwargs: Any) -> ExitCode:
            given = {name: kwargs[name] for name in _SHARED}
            mine: dict[str, Any] = {name: value for name, value in kwargs.items() if name in names}
            return with_planner(terminal, lambda client: function(terminal, client, **mine), **given)  # type: ignore[call-arg]

        annotations = inspect.get_annotations(function, eval_str=False)
        own = [parameter.replace(annotation=_evaluated(annotations, parameter.name, function)) for parameter in own]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in _SHARED.items()
        ]
        first = inspect.Parameter("terminal", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Terminal)
        with_client.__signature__ = inspect.Signature([first, *own, *shared])  # type: ignore[attr-defined]
        return verb(prints_data=prints_data, output=output)(with_client)

    return decorate


def with_planner(terminal: Terminal, use: Callable[[Client], ExitCode], **given: Any) -> ExitCode:
    """Return what ``use`` returns for a client, or the exit code of a call that failed, which is reported.

    Args:
        terminal: where a failure is reported.
        use: makes the calls.
        **given: the options of a planner: ``server``, ``ca``, ``cert``, ``key`` and ``token_file``.
    """
    from hetis.planner.cli.call_failures import report_call_failure
    from hetis.planner.client import CallError, Client

    place = _connection(given)
    try:
        with Client(place) as client:
            return use(client)
    except CallError as error:
        return report_call_failure(terminal, error, place.address, is_plain=place.is_plain)


def _evaluated(annotations: dict[str, Any], name: str, function: Callable[..., Any]) -> Any:
    """Return an annotation of a verb; those of its first two parameters are for type checkers only and never read."""
    annotation = annotations[name]
    return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation


def _connection(given: dict[str, Any]) -> Connection:
    from hetis.planner.client import Connection

    try:
        place = Connection(
            address=given["server"],
            ca=given["ca"],
            cert=given["cert"],
            key=given["key"],
            token_file=given["token_file"],
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for path in (place.ca, place.cert, place.key, place.token_file):
        if path is not None:
            path.read_bytes()  # fails here, with the name of the file, if it cannot be read
    return place
