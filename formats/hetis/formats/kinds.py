"""Kinds of documents, and their reading: one pass finds every problem and says where it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hetis.formats.errors import MAX_SHOWN, DocumentError, Problem, did_you_mean, shown, single_problem
from hetis.formats.fields import API_VERSION, ERROR_LIMIT, Check, Document, ErrorLimit, Found
from hetis.formats.files import file_label, read_text
from hetis.formats.positions import Text, parse_text
from hetis.solver.errors import InvalidProblemError

DocumentT = TypeVar("DocumentT", bound=BaseModel)
DocumentU = TypeVar("DocumentU", bound=Document)
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Generic[ValueT]):
    """A kind of document."""

    document: type[Document]  # form of the document; the class is named after the kind
    value: type[ValueT]  # the value that it represents
    # Returns the value of plain data, or raises `DocumentError` with every problem
    parse: Callable[[Any, Text], ValueT]
    # Returns a value's document as plain data; reading it again gives an equal value
    to_data: Callable[[ValueT], dict[str, Any]]

    @property
    def name(self) -> str:
        return kind_of_document(self.document)

    def load(self, path: str | os.PathLike[str]) -> ValueT:
        """Return the value of a YAML or JSON file (``-``: stdin). Raises DocumentError with every problem."""
        return self.parse(*read_data(path))


def unwritten(value: object) -> Mapping[str, Any]:
    """Stand for ``to_data`` of a kind that only people write."""
    raise TypeError(f"a {type(value).__name__} is only read")


def kind_of(
    document: type[DocumentU],
    value: type[ValueT],
    *,
    to_value: Callable[[DocumentU], ValueT],
    to_data: Callable[[ValueT], Mapping[str, Any]] = unwritten,
    check: Check | None = None,
    check_sums: Callable[[DocumentU], Found] | None = None,
) -> Kind[ValueT]:
    """Return a kind of document. ``to_data`` returns a value's document without ``apiVersion`` and ``kind``."""

    def parse(data: Any, source: Text) -> ValueT:
        return validated(document, data, source, to_value=to_value, check=check, check_sums=check_sums)

    return Kind(document=document, value=value, parse=parse, to_data=with_envelope(document, to_data))


def with_envelope(
    document: type[Document], to_data: Callable[[ValueT], Mapping[str, Any]]
) -> Callable[[ValueT], dict[str, Any]]:
    """Return a function that returns the same with ``apiVersion`` and ``kind`` in front."""
    envelope = {"apiVersion": API_VERSION, "kind": kind_of_document(document)}
    return lambda value: {**envelope, **to_data(value)}


def kind_of_document(document: type[BaseModel]) -> str:
    return document.__name__.removesuffix("Document")


def read_data(path: str | os.PathLike[str]) -> tuple[Any, Text]:
    """Return the plain data of a YAML or JSON file (``-``: standard input). Raises DocumentError if it is neither."""
    return parse_text(read_text(path), file_label(path))


def refuse_other_than_mapping(data: Any, source: Text) -> None:
    """Raise a `DocumentError` for data that cannot be a document."""
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {shown(data)}, expected a mapping with apiVersion, kind, ..."
        raise single_problem(source.file, what)


def validated(
    document: type[DocumentT],
    data: Any,
    source: Text,
    *,
    to_value: Callable[[DocumentT], ValueT],
    check: Check | None = None,
    check_sums: Callable[[DocumentT], Found] | None = None,
    context: Mapping[str, Any] | None = None,
) -> ValueT:
    """Return the value of ``data``, a document of that class. Raises DocumentError with its problems, up to 100.

    ``check`` looks at plain data, whatever else is wrong; ``check_sums`` at a document without other problems.
    """
    refuse_other_than_mapping(data, source)
    kind = kind_of_document(document)
    problems = source.problems[: MAX_SHOWN + 1]
    if has_other_kind := "kind" in data and data["kind"] != kind:
        problems.append(source.problem(("kind",), f"is {shown(data['kind'])}, expected {kind}"))
        if not _has_fields_of(document, data):  # it may be right as a document of the kind that it names
            raise DocumentError(problems)
    parsed: DocumentT | None = None
    limit = ErrorLimit(most_errors=MAX_SHOWN, look_up=source.bounds.look_up)
    try:
        parsed = document.model_validate(data, context={**(context or {}), ERROR_LIMIT: limit})
    except ValidationError as error:
        details = error.errors(include_url=False)[: MAX_SHOWN + 1]
        details = [detail for detail in details if not (has_other_kind and detail["loc"] == ("kind",))]
        problems += [_problem(detail, document, data, source) for detail in details]
    found = check(data) if check is not None and len(problems) <= MAX_SHOWN else ()
    problems += [source.problem(path, message) for path, message in islice(found, MAX_SHOWN + 1)]
    if parsed is not None and not problems:
        try:
            found = check_sums(parsed) if check_sums is not None else ()
            problems += [source.problem(path, message) for path, message in islice(found, MAX_SHOWN + 1)]
            if not problems:
                return to_value(parsed)
        except InvalidProblemError as error:
            problems.append(Problem(file=source.file, message=str(error)))
    unique = dict.fromkeys(problems)
    raise DocumentError(sorted(unique, key=lambda problem: (problem.line or 0, problem.column or 0)))


def _has_fields_of(document: type[BaseModel], data: Mapping[str, Any]) -> bool:
    """Return whether ``data`` has all fields that a document needs, and none that it cannot have."""
    fields = {field.alias or name: field for name, field in document.model_fields.items()}
    needed = {name for name, field in fields.items() if field.is_required()}
    return needed <= data.keys() <= fields.keys()


def _problem(detail: ErrorDetails, document: type[BaseModel], data: Any, source: Text) -> Problem:
    """Translate a pydantic error into our wording."""
    path = _path_in(data, detail["loc"])
    value, kind, limits = detail["input"], detail["type"], detail.get("ctx", {})
    match kind:
        case "missing":
            name = str(path[-1])
            hint = f", expected apiVersion: {API_VERSION}" if name == "apiVersion" else ""
            return source.problem(path[:-1], f"{name} is missing{hint}")
        case "extra_forbidden":
            known = _fields_at(document, detail["loc"][:-1])
            hint = did_you_mean(str(path[-1]), known) or f", expected {'one of ' * (len(known) > 1)}{', '.join(known)}"
            return source.problem(path, f"unknown field{hint}")
        case "value_error":
            message = str(limits["error"])
        case "literal_error" if path[-1] == "apiVersion":
            message = f"is {shown(value)}, expected {API_VERSION}"
        case "literal_error" | "enum":
            expected = [word.strip().strip("'") for word in str(limits["expected"]).replace(" or ", ", ").split(",")]
            hint = did_you_mean(value, expected) if isinstance(value, str) else ""
            message = f"{shown(value)} is not one of {', '.join(expected)}{hint}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            sign, limit = _LIMITS[kind]
            # Show the text that the user wrote (`0Gbps`), not the number it stands for.
            written, end = _value_at(data, path), limits[limit]
            number = written if isinstance(written, str) else shown(written)
            message = f"is {number}, must be {sign} {f'{end:.0f}' if end == int(end) else end}"
        case "too_short" | "too_long":
            bound = f"at least {limits.get('min_length')}" if kind == "too_short" else f"at most {limits['max_length']}"
            message = f"has {limits['actual_length']} entries, needs {bound}"
        case "finite_number":
            message = f"is {shown(value)}, must be finite"
        case _:
            message = f"{shown(value)} is not {_NAMES_OF_TYPES.get(kind, 'valid: ' + detail['msg'])}"
    return source.problem(path, message)


_LIMITS = {"greater_than": (">", "gt"), "greater_than_equal": (">=", "ge")}
_LIMITS |= {"less_than": ("<", "lt"), "less_than_equal": ("<=", "le")}
_NAMES_OF_TYPES = {
    **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping"),
    "int_parsing_size": "a whole number of reasonable size",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
}


def _path_in(data: Any, loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """Return the place of an error, without pydantic's marks of keys and of the kinds by which it tells parts apart."""
    path = list[str | int]()
    for part in loc:
        is_mapping = isinstance(data, dict)
        if part == "[key]" or (is_mapping and part not in data and data.get("kind") == part):
            continue
        path.append(part)
        is_item = isinstance(data, list) and isinstance(part, int) and part < len(data)
        data = data.get(part) if is_mapping else data[part] if is_item else None
    return tuple(path)


def _value_at(data: Any, path: Sequence[str | int]) -> object:
    for part in path:
        if isinstance(data, str | int | float):
            break  # it stands for a mapping, such as a bandwidth for a link
        data = data[part]
    return data


def _fields_at(document: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Return the names of the fields that the mapping at pydantic's ``loc`` may have."""
    here: Any = document
    for part in loc:
        kinds = get_args(here.__origin__) if hasattr(here, "__metadata__") else ()
        here = bare_type(here)
        if told := [one for one in kinds if part in _kinds_of(one)]:
            here = told[0]
        elif isinstance(here, type) and issubclass(here, BaseModel):
            here = next((f.annotation for n, f in here.model_fields.items() if part in (n, f.alias)), None)
        else:  # a position in a list or a key of a mapping
            here = (get_args(here) or (None,))[-1]
    here = bare_type(here)
    if not (isinstance(here, type) and issubclass(here, BaseModel)):
        return []
    return [field.alias or name for name, field in here.model_fields.items()]


def _kinds_of(annotation: Any) -> tuple[Any, ...]:
    """Return the values of ``kind`` by which a part is told from others."""
    kind = getattr(annotation, "model_fields", {}).get("kind")
    return () if kind is None else get_args(kind.annotation)


def bare_type(annotation: Any) -> Any:
    """Return ``X`` for ``X | None`` and for ``Annotated[X, ...]``."""
    if hasattr(annotation, "__metadata__"):
        return bare_type(annotation.__origin__)
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        return bare_type(next(argument for argument in get_args(annotation) if argument is not type(None)))
    return annotation
