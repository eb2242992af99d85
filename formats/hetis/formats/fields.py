"""Field types of the documents: unit strings, names, bounded numbers; and the base class of every document part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from hetis.formats import units
from hetis.formats.errors import shown

API_VERSION = "hetis/v1"
UNLIMITED = "unlimited"  # value of a bandwidth


ERROR_LIMIT = "error_limit"  # key in the context of a validation


@dataclass(slots=True, kw_only=True)
class ErrorLimit:
    """The number of errors that one validation collects. Later ones are skipped: nobody reads more, and each costs
    time.
    """

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
    def _until_patience_ends(cls, data: Any, validate: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
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


def _unit_field(parse: Callable[[str], Any], example: str, *, bare: bool = False) -> Callable[[object], Any]:
    """Return a validator of unit strings; ``bare`` also accepts plain numbers in base units."""

    def validate(value: object) -> Any:
        if isinstance(value, str):
            return parse(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if bare or value == 0:
                return value
            raise ValueError(f"{shown(value)} has no unit: write it like {example}")
        raise ValueError(f"{shown(value)} is not text with a unit like {example}")

    return validate


def _schema(example: str, pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "string", "pattern": pattern, "examples": [example]}, {"const": 0}]})


_NUMBER = r"^\s*\+?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?\s*"

Size = Annotated[
    int,
    Field(gt=0, le=2**60),
    BeforeValidator(_unit_field(units.parse_bytes, "80GiB")),
    _schema("80GiB", _NUMBER + r"([KMGTP]i?)?B\s*$"),
]
"""Bytes, as ``80GiB``."""

SizeOrBytes = Annotated[
    int,
    Field(ge=0, le=2**60),
    BeforeValidator(_unit_field(units.parse_bytes, "80GiB", bare=True)),
    WithJsonSchema({"anyOf": [{"type": "string", "examples": ["80GiB"]}, {"type": "integer", "minimum": 0}]}),
]
"""Bytes, as ``80GiB`` or a whole number."""

_RATE = r"([KMGTP]?(bps|bit/s)|([KMGTP]i?)?B/s)\s*$"
BANDWIDTH_PATTERN = _NUMBER + _RATE

Bandwidth = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(_unit_field(units.parse_bandwidth, "100Gbps or 64GB/s")),
    _schema("100Gbps", BANDWIDTH_PATTERN),
]
"""Bytes per second, as ``100Gbps`` or ``64GB/s``."""


def _seconds_per_byte(value: object) -> float:
    if value == UNLIMITED:
        return 0.0
    if isinstance(value, str):
        return units.parse_seconds_per_byte(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{shown(value)} has no unit: write it like 100Gbps or 64GB/s")
    raise ValueError(f"{shown(value)} is not text with a unit like 100Gbps or 64GB/s")


SecondsPerByte = Annotated[
    float,
    Field(ge=0),
    BeforeValidator(_seconds_per_byte),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": f"{BANDWIDTH_PATTERN}|^{UNLIMITED}$",
            "examples": ["25Gbps"],
        }
    ),
]
"""Seconds per byte, written as the bandwidth that takes them: ``25Gbps``, ``300GB/s``, or ``unlimited`` for none."""

Ratio = Annotated[
    float,
    Field(gt=0, le=1),
    BeforeValidator(_unit_field(units.parse_ratio, "90%", bare=True)),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": _NUMBER + r"%?\s*$", "examples": ["90%"]},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            ]
        }
    ),
]
"""A share above 0 and up to 1, as ``90%`` or ``0.9``."""

Duration = Annotated[
    float,
    Field(ge=0),
    BeforeValidator(_unit_field(partial(units.parse_duration, bare=False), "20us")),
    _schema("20us", _NUMBER + r"(ns|us|ms|s|min|h)\s*$"),
]
"""Seconds, as ``20us``."""

Flops = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(_unit_field(units.parse_flops, "312TFLOPS")),
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


Name = Annotated[str, AfterValidator(_name)]
"""Name of a node or zone: it becomes part of device names such as ``l4-3/1``."""

Title = Annotated[str, AfterValidator(_title)]
"""Name of a cluster, model, workload or GPU type: one printable line."""


def _gpu_name(value: str, info: ValidationInfo) -> str:
    inline = (info.context or {}).get("gpu_types", ())
    if value in inline:
        return value
    from hetis.formats import catalogue

    try:
        return catalogue.find_gpu(value, also=inline).gpu.name
    except catalogue.UnknownNameError as error:
        raise ValueError(str(error)) from None


def _model_name(value: str) -> str:
    from hetis.formats import catalogue

    try:
        return catalogue.find_model(value).model.name
    except catalogue.UnknownNameError as error:
        raise ValueError(str(error)) from None


ModelName = Annotated[str, AfterValidator(_model_name)]
"""A model of the catalogue, by name or alias."""

GpuName = Annotated[str, AfterValidator(_gpu_name)]
"""A GPU type of the catalogue, by name or alias, or one that the document defines."""
