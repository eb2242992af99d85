"""Runs a command line: the options of every verb (``-o``, ``-q``, ``-v``, ``--no-color``), and how it can end.

A verb's exit code is its return value. Every way in which a command line can end becomes an exit code, and errors
become messages.
"""

from __future__ import annotations

import errno
import functools
import inspect
import io
import os
import select
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from copy import copy
from enum import StrEnum
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, TypeVar, cast, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from hetis.commands.groups import ungrouped
from hetis.commands.process import INTERRUPTED, ctrl_c_raises, open_closed_streams
from hetis.commands.terminal import OutputFormat, Terminal, in_use, plain_streams

E = TypeVar("E", bound=StrEnum)
T = TypeVar("T")

OK = 0
BROKEN_PIPE = 141


def run_application(
    application: typer.Typer,
    name: str,
    arguments: Sequence[str],
    report_failure: Callable[[Exception], int],
    *,
    defaults: Callable[[], Mapping[str, Any] | None] = lambda: None,
) -> int:
    """Run one command line, ``name`` in its help, and return its exit code. With ``HETIS_DEBUG=1`` an error is raised
    instead.

    ``report_failure`` prints an error and returns its exit code; ``defaults`` returns defaults of options by verb and
    parameter, or None to keep the options' own.
    """
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="replace")  # bars and dashes become question marks instead of errors
    with plain_streams(), _console() as has_lost_reader:
        try:
            with ctrl_c_raises():
                code = _invoke(application, name, arguments, defaults())
                sys.stdout.flush()  # here, not at exit: a full disk or a closed pipe must reach the handlers below
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if _is_broken_pipe(error) and has_lost_reader():  # a socket that breaks raises the same, and is a failure
                return BROKEN_PIPE
            if os.environ.get("HETIS_DEBUG") == "1":
                raise
            try:
                return report_failure(error)
            except (OSError, SystemExit) as again:  # rich exits if stderr is a broken pipe, and has that as the context
                cause = again.__context__ if isinstance(again, SystemExit) else again
                if cause is not None and _is_broken_pipe(cause) and has_lost_reader():
                    return BROKEN_PIPE
                raise
        return code


def version_option(name: str) -> Any:
    """Return a command's option ``--version``."""

    def print_version(wanted: bool) -> None:
        if wanted:
            from importlib.metadata import version

            print(f"{name} {version('hetis')}")
            raise typer.Exit

    return typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")


def _invoke(
    application: typer.Typer, name: str, arguments: Sequence[str], defaults: Mapping[str, Any] | None
) -> int:  # fmt: skip
    try:
        click_command(application)(list(arguments), prog_name=name, default_map=defaults)
    except SystemExit as stop:
        # typer swallows a broken pipe and exits 1; the pipe is still there as the context.
        if stop.__context__ is not None and _is_broken_pipe(stop.__context__):
            raise stop.__context__ from None
        # It also turns Ctrl-C into exit code 130 without a word, and has that as the cause.
        if stop.__context__ is not None and isinstance(stop.__context__.__cause__, KeyboardInterrupt):
            raise stop.__context__.__cause__ from None
        return stop.code if isinstance(stop.code, int) else OK
    return OK


@functools.cache
def click_command(application: typer.Typer) -> Any:
    """Return the command of an application, which typer itself builds for every command line: 30 ms for forty verbs."""
    _take_one_value_each(application)
    return typer.main.get_command(application)


def _take_one_value_each(application: typer.Typer) -> None:
    """Let all commands of an application refuse a second value of an option that is not repeatable."""
    application.info.cls = _Group
    for command in application.registered_commands:
        command.cls = _Command
    for group in application.registered_groups:
        if group.typer_instance is not None:
            _take_one_value_each(group.typer_instance)


# Names of the parameters of the verb that runs whose values are from the command line, not from `run_application`'s
# ``defaults`` or the environment.
given: ContextVar[frozenset[str]] = ContextVar("given", default=frozenset())


class _Command(TyperCommand):
    """A verb. Its help begins with examples; that of a verb with many options has the usual ones."""

    @property
    def _usual(self) -> Collection[str]:
        return getattr(self.callback, _USUAL, ())

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown = copy(self)
        if self.epilog:
            examples = (line.strip() for line in self.epilog.splitlines() if line.strip())
            shown.help, shown.epilog = "\n\n".join([*examples, self.help or ""]), None
        if self._usual and not ctx.meta.get(_USUAL):
            shown.params = [one for one in self.params if one.name in (*self._usual, "help_all")]
        TyperCommand.format_help(shown, ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _refuse_second_values(self, ctx, args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
        given.set(frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE"))
        return super().invoke(ctx)


_USUAL = "usual_options"


def _show_all_help(ctx: typer.Context, is_given: bool) -> None:
    if is_given:
        ctx.meta[_USUAL] = True
        typer.echo(ctx.get_help(), color=ctx.color)
        raise typer.Exit


class _Group(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _refuse_second_values(self, ctx, args)
        return super().parse_args(ctx, args)


def _refuse_second_values(command: TyperCommand | TyperGroup, ctx: Any, args: Sequence[str]) -> None:
    """Refuse options that are given twice and take one value: the parser would use the last without a word.

    Flags may be repeated: a later ``--no-verify`` of a script's user deliberately overrides ``--verify``.
    """
    if ctx.resilient_parsing:  # for completions
        return
    reader, single = copy(command), dict[str, Any]()
    reader.params = [copy(parameter) for parameter in command.params]
    for parameter in reader.params:
        if isinstance(parameter, TyperOption) and not parameter.multiple and not parameter.is_flag:
            parameter.multiple = True  # so that the parser keeps all of its values
            single[parameter.name] = parameter
    values, _, given = reader.make_parser(ctx).parse_args(list(args))
    if any(parameter.is_eager for parameter in given):  # --help and --version come first
        return
    for name, parameter in single.items():
        if len(found := values.get(name) or ()) > 1:
            words = f"takes one value, and has {len(found)}: {', '.join(map(str, found))}"
            raise typer.BadParameter(words, ctx=ctx, param=parameter)


def _is_broken_pipe(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


@contextmanager
def _console() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether the reader of stdout or stderr went away.

    It polls copies of them: rich puts /dev/null in place of a stdout that broke before it passes the error on.
    """
    copies = list[int]()
    for stream in (1, 2):
        with suppress(OSError):  # it is closed
            copies.append(os.dup(stream))

    def has_lost_reader() -> bool:
        poll = select.poll()
        for copy_of_stream in copies:
            poll.register(copy_of_stream, 0)  # errors and hang-ups are always reported
        return bool(poll.poll(0))

    try:
        yield has_lost_reader
    finally:
        for copy_of_stream in copies:
            os.close(copy_of_stream)


OutputOption = Annotated[OutputFormat, typer.Option("--output", "-o", help="Output format on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors on stderr.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print more detail on stderr.")]
NoColorOption = Annotated[bool, typer.Option("--no-color", help="Print plain text, as with NO_COLOR=1.")]
HelpAllOption = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_show_all_help, help="Show all options and exit.")
]
_SHARED = {"quiet": QuietOption, "verbose": VerboseOption, "no_color": NoColorOption}


P = ParamSpec("P")


def verb(
    *, prints_data: bool = True, output: OutputFormat = OutputFormat.TABLE, usual: Collection[str] = ()
) -> Callable[[Callable[Concatenate[Terminal, P], int]], Callable[P, None]]:
    """Turn ``f(terminal, ...) -> exit code`` into a typer command with the shared options and those of its groups.

    The shared options become parameters of the signature that typer reads, and reach the verb as one `Terminal`.
    A verb that ``prints_data`` has an ``-o`` option, whose default is ``output``. Its help shows the options of the
    ``usual`` parameters only, if there are some, and all others with ``--help-all``.
    """

    def decorate(function: Callable[Concatenate[Terminal, P], int]) -> Callable[P, None]:
        run: Callable[..., int] = ungrouped(function)
        own = list(inspect.signature(run).parameters.values())[1:]

        @functools.wraps(function)
        def command(
            *args: Any, quiet: bool, verbose: bool, no_color: bool, output_format: OutputFormat = output,
            help_all: bool = False, **mine: Any,
        ) -> None:  # fmt: skip
            verbosity = -1 if quiet else int(verbose)
            terminal = Terminal(output=output_format, verbosity=verbosity, color=not no_color)
            in_use.set(terminal)
            _refuse_stdin_twice(own, mine)
            code = run(terminal, *args, **mine)
            if code != OK:
                raise typer.Exit(int(code))

        shared = [_keyword("output_format", OutputOption, output)] if prints_data else []
        shared += [_keyword(name, kind, False) for name, kind in _SHARED.items()]
        shared += [_keyword("help_all", HelpAllOption, False)] if usual else []
        # A blank line ends a paragraph of the help; other ends of lines are those of the source.
        command.__doc__ = "\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))
        command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        setattr(command, _USUAL, usual)
        return in_own_words(cast(Callable[P, None], command))

    return decorate


def in_own_words(command: Callable[P, None]) -> Callable[P, None]:
    """Let a command refuse invalid values with our messages, and return it."""
    parameters = [_with_own_words(parameter) for parameter in inspect.signature(command).parameters.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _with_own_words(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a command's parameter whose invalid values are refused with our messages.

    This concerns a choice (an enumeration, a `Literal`) or a number without a parser. typer has pydantic refuse these,
    with messages about its own input and without the nearest word.
    """
    if get_origin(parameter.annotation) is not Annotated:
        return parameter
    given, info = get_args(parameter.annotation)
    inner = () if get_origin(given) is Literal else get_args(given)
    kind = next((one for one in inner if one is not type(None)), given)  # the type inside an optional one
    if info.parser is not None:
        return parameter
    info = copy(info)
    if get_origin(kind) is Literal:
        info.parser = functools.partial(one_of, known=get_args(kind))
    elif isinstance(kind, type) and issubclass(kind, StrEnum):
        info.parser = choice_of(kind)
    elif kind in (int, float):
        info.parser = functools.partial(_number, kind, info.min, info.max)
    annotated: Any = Annotated  # for types that are known only at run time
    return parameter.replace(annotation=annotated[given, info])


def _number(kind: type[int] | type[float], least: float | None, most: float | None, text: str) -> float:
    """Parse a number within bounds, each of which may be missing."""
    try:
        value = kind(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a {'whole number' if kind is int else 'number'}") from None
    bounds = [f"{words} {bound}" for words, bound in (("at least", least), ("at most", most)) if bound is not None]
    if (least is not None and not value >= least) or (most is not None and not value <= most):
        raise typer.BadParameter(f"{text} is out of range, must be {' and '.join(bounds)}")
    return value


def choice_of(kind: type[E]) -> Callable[[str], E]:
    """Return the parser of an option that takes the words of an enumeration."""
    words = [one.value for one in kind]
    return lambda text: kind(one_of(text, words))


def one_of(text: str, known: Collection[str]) -> str:
    """Return a word that is known, or refuse it with the nearest one."""
    from hetis.formats.errors import did_you_mean

    if text not in known:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(known)}{did_you_mean(text, known)}")
    return text


def _refuse_stdin_twice(parameters: Sequence[inspect.Parameter], given: Mapping[str, Any]) -> None:
    """Refuse ``-`` for several inputs: the first would have all of it, and the next nothing."""
    from_stdin = [
        _label(parameter)
        for parameter in parameters
        if parameter.name != "out"  # there it is standard output
        for value in (given[parameter.name] if isinstance(given[parameter.name], list) else [given[parameter.name]])
        if value == "-"
    ]
    if len(from_stdin) > 1:
        wanted = " and ".join(dict.fromkeys(from_stdin))
        raise typer.BadParameter(f"standard input (-) can be read only once, not {len(from_stdin)} times for {wanted}")


def _label(parameter: inspect.Parameter) -> str:
    """Return the name of a parameter in the help."""
    info = parameter.annotation.__metadata__[0]
    names = [name for name in (info.default, *(info.param_decls or ())) if str(name).startswith("--")]
    return str(names[0] if names else info.metavar or parameter.name.upper())


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
