"""The options of every verb, ``-o``, ``-q``, ``-v`` and ``--no-color``, and its exit code as the return value."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from hetis.formats.command_line.running import OK
from hetis.formats.command_line.terminal import OutputFormat, Terminal, in_use

OutputOption = Annotated[OutputFormat, typer.Option("--output", "-o", help="Form of the data on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only on stderr.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="More detail on stderr.")]
NoColorOption = Annotated[bool, typer.Option("--no-color", help="Plain text; so does NO_COLOR=1.")]


P = ParamSpec("P")


def verb(
    *, prints_data: bool = True, output: OutputFormat = OutputFormat.TABLE
) -> Callable[[Callable[Concatenate[Terminal, P], int]], Callable[P, None]]:
    """Turn ``f(terminal, ...) -> exit code`` into a typer command with the shared options.

    The shared options become parameters of the signature that typer reads, and reach the verb as one `Terminal`.

    Args:
        prints_data: whether the verb prints data, and therefore has an ``-o`` option.
        output: default of ``-o``.
    """

    def decorate(function: Callable[Concatenate[Terminal, P], int]) -> Callable[P, None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        names = {parameter.name for parameter in own}

        @functools.wraps(function)
        def command(*args: P.args, **kwargs: P.kwargs) -> None:
            given: dict[str, Any] = {name: value for name, value in kwargs.items() if name not in names}
            terminal = Terminal(
                output=given.get("output_format", output),
                verbosity=-1 if given["quiet"] else int(given["verbose"]),
                color=not given["no_color"],
            )
            in_use.set(terminal)
            mine: dict[str, Any] = {name: value for name, value in kwargs.items() if name in names}
            code = function(terminal, *args, **mine)
            if code != OK:
                raise typer.Exit(int(code))

        shared = [_keyword("output_format", OutputOption, output)] if prints_data else []
        shared += [
            _keyword("quiet", QuietOption, False),
            _keyword("verbose", VerboseOption, False),
            _keyword("no_color", NoColorOption, False),
        ]
        parameters = [*own, *shared]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
