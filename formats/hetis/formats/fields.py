"""Parts of documents: field types, the base of every part, and their values as plain data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from hetis.formats import catalogue, units
from hetis.formats.errors import shown
from hetis.formats.positions import Path, path_text

API_VERSION = "hetis/v1"
UNLIMITED = "unlimited"  # value of a bandwidth
ERROR_LIMIT = "error_limit"  # key in the context of a validation

DocumentT = TypeVar("DocumentT", bound=BaseModel)
DocumentU = TypeVar("DocumentU", bound="Document")
ValueT = TypeVar("ValueT")
Found = Iterable[tuple[Sequence[str | int], str]]
"""Problems as (path, message)."""
Check = Callable[[Mapping[str, Any]], Found]
"""Yields problems that concern several fields. Runs on raw data of any shape, so that a file with a misspelt field
*and* a duplicate name shows both; wrong types are reported elsewhere."""


@dataclass(slots=True, kw_only=True)
class ErrorLimit:
    """The most errors that one validation collects. Later ones are skipped: each costs time, and few are read."""

    most_errors: int
    look_up: Callable[[], None]
    num_errors: int = 0


class DocumentPart(BaseModel):
    """A mapping of a document: no unknown fields, no conversion between types, no NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _validate_up_to_error_limit(
        cls, data: Any, validate: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        limit: ErrorLimit | None = (info.context or {}).get(ERROR_LIMIT)
        if limit is None:
            return validate(data)
        if limit.num_errors > limit.most_errors:
            return cls.model_construct()  # the document is refused in any case
        before = limit.num_errors
        try:
            return validate(data)
        except ValidationError as error:
            limit.look_up()
            limit.num_errors = before + error.error_count()  # errors of inner parts are included
            raise


class Document(DocumentPart):
    """A whole document. Each class adds its ``kind``."""

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]


# --- fields


def _unit_field(
    parse: Callable[[str], Any], example: str, *, bare: bool = False, zero: bool = True
) -> BeforeValidator:  # fmt: skip
    """Return a validator of unit strings; ``bare`` also accepts plain numbers in base units, ``zero`` a plain 0."""

    def validate(value: object) -> Any:
        if isinstance(value, str):
            return parse(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if bare or (zero and value == 0):
                return value
            raise ValueError(f"{shown(value)} has no unit: write it like {example}")
        raise ValueError(f"{shown(value)} is not text with a unit like {example}")

    return BeforeValidator(validate)


def _schema(example: str, pattern: str, other: Mapping[str, Any] | None = None) -> WithJsonSchema:
    text = {"type": "string", "pattern": pattern, "examples": [example]}
    return WithJsonSchema(text if other is None else {"anyOf": [text, other]})


_NUMBER = r"^\s*\+?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?\s*"
BANDWIDTH_PATTERN = _NUMBER + r"([KMGTP]?(bps|bit/s)|([KMGTP]i?)?B/s)\s*$"
_BANDWIDTH_EXAMPLE = "100Gbps or 64GB/s"

Size = Annotated[
    int,
    Field(gt=0, le=2**60),
    _unit_field(units.parse_bytes, "80GiB"),
    _schema("80GiB", _NUMBER + r"([KMGTP]i?)?B\s*$"),
]
"""Bytes, as ``80GiB``."""

SizeOrBytes = Annotated[
    int,
    Field(ge=0, le=2**60),
    _unit_field(units.parse_bytes, "80GiB", bare=True),
    WithJsonSchema({"anyOf": [{"type": "string", "examples": ["80GiB"]}, {"type": "integer", "minimum": 0}]}),
]
"""Bytes, as ``80GiB`` or a whole number."""


def _reserved(value: object) -> int | float:
    if isinstance(value, str) and value.strip().endswith("%"):
        return units.parse_ratio(value)
    if isinstance(value, str):
        return units.parse_bytes(value)
    if value == 0 and isinstance(value, int | float) and not isinstance(value, bool):
        return 0
    raise ValueError(f"{shown(value)} has no unit: write it like 2GiB or 10%")


Reserved = Annotated[
    int | float,
    Field(ge=0, le=2**60),
    BeforeValidator(_reserved),
    _schema("2GiB", _NUMBER + r"(([KMGTP]i?)?B|%)\s*$", {"const": 0}),
]
"""Memory of a GPU, as bytes (``2GiB``), or as a share of it (``10%``), which is a float."""

Bandwidth = Annotated[
    float,
    Field(gt=0),
    _unit_field(units.parse_link_bandwidth, _BANDWIDTH_EXAMPLE),
    _schema("100Gbps", BANDWIDTH_PATTERN),
]
"""Bytes per second, as ``100Gbps`` or ``64GB/s``."""

SecondsPerByte = Annotated[
    float,
    Field(ge=0),
    _unit_field(
        lambda text: 0.0 if text == UNLIMITED else units.parse_seconds_per_byte(text), _BANDWIDTH_EXAMPLE, zero=False
    ),
    WithJsonSchema({"type": "string", "pattern": f"{BANDWIDTH_PATTERN}|^{UNLIMITED}$", "examples": ["25Gbps"]}),
]
"""Seconds per byte, written as the bandwidth that takes them: ``25Gbps``, ``300GB/s``, or ``unlimited`` for none."""

Ratio = Annotated[
    float,
    Field(gt=0, le=1),
    _unit_field(units.parse_ratio, "90%", bare=True),
    _schema("90%", _NUMBER + r"%?\s*$", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
]
"""A share above 0 and up to 1, as ``90%`` or ``0.9``."""

Duration = Annotated[
    float,
    Field(ge=0),
    _unit_field(functools.partial(units.parse_duration, bare=False), "20us"),
    _schema("20us", _NUMBER + r"(ns|us|ms|s|min|h)\s*$", {"const": 0}),
]
"""Seconds, as ``20us``."""

Flops = Annotated[
    float,
    Field(gt=0),
    _unit_field(units.parse_flops, "312TFLOPS"),
    _schema("312TFLOPS", _NUMBER + r"[KMGTP]?FLOPS\s*$"),
]
"""FLOP/s, as ``312TFLOPS``."""

Usd = Annotated[float, Field(ge=0, le=1e9)]
"""USD per hour."""


def _name(value: str) -> str:
    if not value or len(value) > 200:
        raise ValueError(f"a name has 1 to 200 characters, not {len(value)}")
    if any(not (c.isalnum() or c in "._-") for c in value) or not value[0].isalnum():
        raise ValueError(f"{shown(value)} is not a name: letters, digits, '.', '_' and '-', a letter or digit first")
    return value


def _title(value: str) -> str:
    if not value.strip() or len(value) > 200 or not value.isprintable():
        raise ValueError(f"{shown(value)} is not a name: 1 to 200 printable characters")
    return value


def _gpu_name(value: str, info: ValidationInfo) -> str:
    context = info.context or {}
    inline = context.get("gpu_types", ())
    if value in inline:
        return value
    try:
        return catalogue.find_gpu(value, also=inline).gpu.name
    except catalogue.UnknownNameError as error:
        own = "; your own: gpu_types" if "gpu_types" in context else ""
        hint = "" if error.ambiguous else f" (known types: hetis-plan catalog gpus{own})"
        raise ValueError(f"{error}{hint}") from None


def _model_name(value: str) -> str:
    try:
        return catalogue.find_model(value).model.name
    except catalogue.UnknownNameError as error:
        raise ValueError(str(error)) from None


Name = Annotated[str, AfterValidator(_name)]
"""Name of a node or zone: it becomes part of device names such as ``l4-3/1``."""

Title = Annotated[str, AfterValidator(_title)]
"""Name of a cluster, model, workload or GPU type: one printable line."""

ModelName = Annotated[str, AfterValidator(_model_name)]
"""A model of the catalogue, by name or alias."""

GpuName = Annotated[str, AfterValidator(_gpu_name)]
"""A GPU type of the catalogue, by name or alias, or one that the document defines."""


# --- values and plain data


@functools.cache
def _adapter(value: Any) -> TypeAdapter[Any]:  # a millisecond or more, where it has many fields
    return TypeAdapter(value)


def value_of(value: type[ValueT], data: BaseModel | Mapping[str, Any], **changes: Any) -> ValueT:
    """Return the value of a dataclass whose fields are those of a part; fields that it lacks are left out."""
    fields = data.model_dump(exclude=set(changes)) if isinstance(data, BaseModel) else data
    made: ValueT = _adapter(cast(Any, value)).validate_python({**fields, **changes})
    return made


def plain(value: Any) -> Any:
    """Return a value as plain data: dataclasses and parts as their fields, tuples as lists, enums as their values."""
    names = _field_names(cast(Any, type(value)))
    if names is not None:
        return {name: one if type(one := getattr(value, name)) in _SCALARS else plain(one) for name in names}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, DocumentPart):
        return value.model_dump()
    return value.value if isinstance(value, Enum) else value


_SCALARS = {str, int, float, bool, type(None)}


@functools.cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


def mapping(value: object) -> dict[str, Any]:
    """Return a mapping as it is, and anything else as an empty mapping."""
    return value if isinstance(value, dict) else {}


def listed(value: object) -> list[Any]:
    """Return a list as it is, and anything else as an empty list."""
    return value if isinstance(value, list) else []


def entries(value: object) -> list[tuple[int, dict[str, Any]]]:
    """Return the mappings of a list with their positions."""
    return [(i, entry) for i, entry in enumerate(listed(value)) if isinstance(entry, dict)]


def duplicates(path: Path, among: Iterable[tuple[int, dict[str, Any]]], field: str, noun: str) -> Found:
    """Yield a problem for every entry whose name an earlier one has."""
    first = dict[Any, int]()
    for i, entry in among:
        name = entry.get(field)
        if isinstance(name, bool) or not isinstance(name, str | int):
            continue
        if name in first:
            yield (*path, i, field), f"duplicate {noun} {shown(name)}, first at {path_text((*path, first[name]))}"
        first.setdefault(name, i)


def whole(value: object, least: int = 1, most: float = 2**40) -> int | None:
    """Return a whole number of reasonable size, or None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most else None


def present(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping without the fields that are None."""
    return {name: value for name, value in data.items() if value is not None}
