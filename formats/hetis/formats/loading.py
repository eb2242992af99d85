"""Reads a checked document from text in one pass that finds every problem, its place and the nearest valid name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hetis.formats.errors import MAX_SHOWN, DocumentError, Problem, did_you_mean, shown, single_problem
from hetis.formats.fields import API_VERSION, ERROR_LIMIT, ErrorLimit
from hetis.formats.files import file_label, read_text
from hetis.formats.positions import Text, parse_text
from hetis.solver.errors import InvalidProblemError

DocumentT = TypeVar("DocumentT", bound=BaseModel)
ValueT = TypeVar("ValueT")
Check = Callable[[Mapping[str, Any]], Iterable[tuple[Sequence[str | int], str]]]
"""Yields problems that concern several fields, as (path, message). Must accept data of any shape."""

KINDS = (
    "Cluster", "ModelSpec", "Workload", "Profile", "Plan", "DispatchState", "DispatchRequests", "ShareProblem",
    "LayersProblem", "Tenants",
)  # fmt: skip


def read_data(path: str | os.PathLike[str]) -> tuple[Any, Text]:
    """Return the plain data of a YAML or JSON file (``-``: standard input).

    Raises:
        DocumentError: the file is not readable or not YAML.
    """
    return parse_text(read_text(path), file_label(path))


def validated(
    document: type[DocumentT],
    data: Any,
    source: Text,
    *,
    to_value: Callable[[DocumentT], ValueT],
    check: Check | None = None,
    context: Mapping[str, Any] | None = None,
) -> ValueT:
    """Return the solver value of ``data``, which must be a document of the given class.

    Raises:
        DocumentError: with every problem of the document, up to 100.
    """
    kind = document.__name__.removesuffix("Document")
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {shown(data)}, expected a mapping with apiVersion, kind, ..."
        raise single_problem(source.file, what)
    if "kind" in data and data["kind"] != kind:
        raise DocumentError([*source.problems, source.problem(("kind",), f"is {shown(data['kind'])}, expected {kind}")])
    problems = source.problems[: MAX_SHOWN + 1]
    parsed: DocumentT | None = None
    limit = ErrorLimit(most_errors=MAX_SHOWN, look_up=source.bounds.look_up)
    try:
        parsed = document.model_validate(data, context={**(context or {}), ERROR_LIMIT: limit})
    except ValidationError as error:
        details = error.errors(include_url=False)[: MAX_SHOWN + 1]
        problems += [_problem(detail, document, data, source) for detail in details]
    found = check(data) if check is not None and len(problems) <= MAX_SHOWN else ()
    problems += [source.problem(path, message) for path, message in islice(found, MAX_SHOWN + 1)]
    if parsed is not None and not problems:
        try:
            return to_value(parsed)
        except InvalidProblemError as error:
            problems.append(Problem(file=source.file, message=str(error)))
    unique = dict.fromkeys(problems)
    raise DocumentError(sorted(unique, key=lambda problem: (problem.line or 0, problem.column or 0)))


def _problem(detail: ErrorDetails, document: type[BaseModel], data: Any, source: Text) -> Problem:
    """Translate a pydantic error into our wording."""
    path = tuple(part for part in detail["loc"] if part != "[key]")
    value, kind, limits = detail["input"], detail["type"], detail.get("ctx", {})
    match kind:
        case "missing":
            name = str(path[-1])
            return source.problem(path[:-1], f"{name} is missing{_expected_api_version(name)}")
        case "extra_forbidden":
            known = _fields_at(document, path[:-1])
            hint = did_you_mean(str(path[-1]), known) or f", expected {_one_of(known)}"
            return source.problem(path, f"unknown field{hint}")
        case "value_error":
            message = str(limits["error"])
        case "literal_error" if path[-1] == "apiVersion":
            message = f"is {shown(value)}, expected {API_VERSION}"
        case "literal_error":
            expected = [word.strip().strip("'") for word in str(limits["expected"]).replace(" or ", ", ").split(",")]
            hint = did_you_mean(value, expected) if isinstance(value, str) else ""
            message = f"{shown(value)} is not one of {', '.join(expected)}{hint}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            sign, limit = _LIMITS[kind]
            # Show the text that the user wrote (`0Gbps`), not the number it stands for.
            message = f"is {_shown_number(_value_at(data, path))}, must be {sign} {_plain(limits[limit])}"
        case "too_short" | "too_long":
            bound = f"at least {limits.get('min_length')}" if kind == "too_short" else f"at most {limits['max_length']}"
            message = f"has {limits['actual_length']} entries, needs {bound}"
        case "finite_number":
            message = f"is {shown(value)}, must be finite"
        case _:
            message = f"{shown(value)} is not {_NAMES_OF_TYPES.get(kind, 'valid: ' + detail['msg'])}"
    return source.problem(path, message)


_LIMITS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}
_NAMES_OF_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of reasonable size",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def _expected_api_version(name: str) -> str:
    return f", expected apiVersion: {API_VERSION}" if name == "apiVersion" else ""


def _shown_number(value: object) -> str:
    """Return a number, or the text of a quantity with its unit, as it is shown."""
    return value if isinstance(value, str) else shown(value)


def _plain(limit: float) -> str:
    return f"{limit:.0f}" if limit == int(limit) else str(limit)


def _value_at(data: Any, path: Sequence[str | int]) -> object:
    for part in path:
        if isinstance(data, str | int | float):
            break  # it stands for a mapping, such as a bandwidth for a link
        data = data[part]
    return data


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}" if len(names) > 1 else "".join(names)


def _fields_at(document: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the names of the fields that the mapping at ``path`` may have."""
    here: Any = document
    for part in path:
        here = _without_none(here)
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = next((f.annotation for n, f in here.model_fields.items() if part in (n, f.alias)), None)
        else:  # a position in a list or a key of a mapping
            here = (get_args(here) or (None,))[-1]
    here = _without_none(here)
    if not (isinstance(here, type) and issubclass(here, BaseModel)):
        return []
    return [field.alias or name for name, field in here.model_fields.items()]


def _without_none(annotation: Any) -> Any:
    """Return ``X`` for ``X | None`` and for ``Annotated[X, ...]``."""
    if hasattr(annotation, "__metadata__"):
        return _without_none(annotation.__origin__)
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        return _without_none(next(argument for argument in get_args(annotation) if argument is not type(None)))
    return annotation
