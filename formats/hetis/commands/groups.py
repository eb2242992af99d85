"""Groups of options: dataclasses with one option per field.

A command with a parameter of such a type has the group's options on its command line, and receives their values as one
object (`ungrouped`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_type_hints

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def group(kind: type[T]) -> type[T]:
    """Make a class a group of options."""
    return dataclass(frozen=True, kw_only=True, eq=False, repr=False)(kind)  # no eq and repr: --help makes all groups


def option(usage: str, default: Any = None, *, shown: str | Literal[True] = True, panel: str = "", **more: Any) -> Any:
    """Declare a field of a group as an option.

    Args:
        usage: its names, the form of its value, and its help text: ``--model -m NAME|FILE: The model.``
        default: its value if it is not specified, passed through the parser, too; ``...`` if it must be specified.
        shown: the default as displayed in the help; True displays it as it is, and None not at all.
        panel: the panel of the help to which it belongs.
        **more: further arguments of `typer.Option`.
    """
    declared = {"usage": usage, "shown": shown, "panel": panel, **more}
    return field(default=MISSING if default is ... else default, metadata={"option": declared})


def names_of(usage: str) -> list[str]:
    """Return the names of an option that is declared so."""
    return [word for word in usage.partition(": ")[0].split() if word.startswith("-")]


def form_of(usage: str) -> str | None:
    """Return the form of the value of an option that is declared so, if it has one."""
    return next((word for word in usage.partition(": ")[0].split() if not word.startswith("-")), None)


def _info(usage: str, *, shown: str | Literal[True], panel: str, **more: Any) -> Any:
    """Return what typer has of an option."""
    import typer  # not at the top: requests are declared as groups, and programs make them

    says = usage.partition(": ")[2] or None
    return typer.Option(
        *names_of(usage), metavar=form_of(usage), help=says, show_default=shown, rich_help_panel=panel or None, **more
    )


def ungrouped(function: Callable[..., T]) -> Callable[..., T]:
    """Return a command whose parameters are the options of its groups instead of the groups."""
    parameters, groups = list[inspect.Parameter](), dict[str, Any]()
    annotated: Any = Annotated  # Any, because the annotated types are known only at run time
    kinds = get_type_hints(function, inspect.unwrap(function).__globals__, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind = kinds.get(parameter.name, parameter.annotation)
        if not _is_group(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        groups[parameter.name], types = kind, _types_of(kind)
        for one in fields(kind):
            default = parameter.empty if one.default is MISSING else one.default
            annotation = annotated[types[one.name], _info(**one.metadata["option"])]
            parameters.append(parameter.replace(name=one.name, default=default, annotation=annotation))

    @functools.wraps(function)
    def on_command_line(*args: Any, **given: Any) -> T:
        made = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        return function(*args, **given, **made)

    on_command_line.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return on_command_line


def _is_group(kind: Any) -> bool:
    return is_dataclass(kind) and all("option" in one.metadata for one in fields(kind))


_types_of = functools.cache(get_type_hints)
