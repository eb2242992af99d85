"""Arguments of the library's functions, checked against their annotations before anything else is done.

The caller sees all wrong arguments at once, by name, instead of an error from deep inside. Annotations have kinds where
a type is not enough (`hetis.planner.use_cases.request.Kind`): a rate is finite and above 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce, wraps
from inspect import signature
from numbers import Integral, Real
from operator import or_
from types import UnionType
from typing import (
    Annotated,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    create_model,
)
from pydantic_core import ErrorDetails

from hetis.formats.errors import DocumentError, Problem
from hetis.formats.models.document import drafts
from hetis.formats.units import parse_duration, parse_limit, parse_ratio
from hetis.planner.use_cases.request import Kind
from hetis.solver.cluster import Cluster
from hetis.solver.errors import HetisError, InfeasibleError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import LEAST_DEMAND_RPS
from hetis.solver.workload import MOST_BURSTINESS, Workload

P = ParamSpec("P")
A = TypeVar("A")
S = TypeVar("S")
T = TypeVar("T")
Check = Callable[[Any], Any]  # returns the value, or raises ValueError


def checked(function: Callable[P, T], types: Mapping[str, Any] | None = None) -> Callable[P, T]:
    """Return the function with its arguments checked against their annotations, strictly: text is not a number.

    ``types`` are the annotations by name, with kinds (`Kind`), if they are not the function's own.

    Raises:
        DocumentError: raised by the returned function, with every wrong argument.
    """
    parameters = signature(function)
    hints = get_type_hints(function, include_extras=True) if types is None else types
    names = [name for name in parameters.parameters if name in hints]  # without ``self``
    fields: dict[str, Any] = {name: (_checked_type(hints[name]), ...) for name in names}
    form = create_model(
        function.__name__,
        __config__=ConfigDict(strict=True, arbitrary_types_allowed=True, protected_namespaces=()),
        **fields,
    )

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given = parameters.bind(*args, **kwargs)
        given.apply_defaults()
        try:
            read = form.model_validate({name: given.arguments[name] for name in names})
        except ValidationError as error:
            details = error.errors(include_url=False)
            raise DocumentError(_problem(detail, function.__name__) for detail in details) from None
        given.arguments.update((name, getattr(read, name)) for name in names)
        return function(*given.args, **given.kwargs)

    return call


def spread(made: Callable[P, A]) -> Callable[[Callable[[S, A], T]], Callable[Concatenate[S, P], T]]:
    """Return a decorator: a method takes the fields of its arguments, a dataclass, one by one and checked."""

    def decorate(method: Callable[[S, A], T]) -> Callable[Concatenate[S, P], T]:
        @wraps(method)
        def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return method(self, made(*args, **kwargs))

        own = signature(method)
        first = next(iter(own.parameters.values()))
        parameters = [first, *signature(made).parameters.values()]
        call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return checked(spelled_as_arguments(call), get_type_hints(made, include_extras=True))

    return decorate


def spelled_as_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function, whose errors name its arguments where use cases name options of the command line.

    ``--ttft-statistic`` becomes ``ttft_statistic``, and ``--no-verify`` becomes ``verify=False``, if the function has
    such a parameter.
    """
    names = frozenset(signature(function).parameters)

    def argument(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        if name.removeprefix("no_") in names - {name}:
            return f"{name.removeprefix('no_')}=False"
        return name if name in names else option[0]

    def spelled(text: str) -> str:
        return _OPTION.sub(argument, text)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except HetisError as error:
            error.args = tuple(spelled(part) if isinstance(part, str) else part for part in error.args)
            if isinstance(error, InfeasibleError):
                error.reasons = tuple(map(spelled, error.reasons))
            if isinstance(error, DocumentError):
                error.problems = tuple(replace(one, message=spelled(one.message)) for one in error.problems)
            raise

    return call


_OPTION = re.compile(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)(?![\w-])")


def _problem(detail: ErrorDetails, function: str) -> Problem:
    name, *inside = detail["loc"]
    place = f"{name}{''.join(f'[{part}]' for part in inside)}"
    kind, limits = detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        message = str(limits["error"])
    else:
        what = _WORDS[kind].format(**limits) if kind in _WORDS else detail["msg"].removeprefix("Input should be ")
        message = f"is {_shown(detail['input'])}, must be {what}"
    return Problem(file=function, path=place, message=message)


# Replacements for pydantic's descriptions of errors (``Input should be ...``).
_WORDS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "text",
    "bool_type": "True or False",
    "is_instance_of": "a list",
    "sequence_str": "a list",
    "dict_type": "a mapping",
    "finite_number": "finite",
}


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # a __repr__ of any class may raise anything
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: object) -> object:
    """Return numbers of other libraries, such as numpy, as Python numbers."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _listed(value: object) -> object:
    """Return a single text or path as a tuple of one; text is a sequence of letters otherwise."""
    return (value,) if isinstance(value, str | os.PathLike) else value


def _quantity(parse: Callable[[str], float], example: str, fits: Callable[[float], bool], limit: str) -> Check:
    """Return a check for a number or text with a unit, which becomes a number."""

    def check(value: Any) -> Any:
        value = _plain(value)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"is {_shown(value)}, must be a number or text such as {example!r}")
        try:
            number = float(parse(value) if isinstance(value, str) else value)
        except OverflowError:  # of a whole number above 1.8e308
            raise ValueError(f"is {_shown(value)}, which is too large") from None
        if not fits(number):
            raise ValueError(f"is {_shown(value)}, must be {limit}")
        return number

    return check


def _word_or(words: Sequence[str], otherwise: Check) -> Check:
    """Return a check that also accepts some words."""

    def check(value: Any) -> Any:
        word = value.strip().lower() if isinstance(value, str) else None
        return word if word in words else otherwise(value)

    return check


def _instance_of(kinds: tuple[type, ...], expected: str) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise ValueError(f"is {_shown(value)}, must be {expected}")
        return value

    return check


def one_of(known: Sequence[str]) -> AfterValidator:
    """Return a check for text that is one of some names."""

    def check(text: str, info: ValidationInfo) -> str:
        if text not in known:
            raise ValueError(f"unknown {info.field_name} {text!r}, expected one of {', '.join(filter(None, known))}")
        return text

    return AfterValidator(check)


def _as_drafts(text: str) -> str:
    drafts(text)  # raises ValueError
    return text


def _limit_on(name: str) -> PlainValidator:
    limit_s = _quantity(lambda text: parse_limit(text, name), "200ms", lambda seconds: seconds > 0, "> 0")
    return PlainValidator(_word_or(("none", "default"), limit_s))


_seconds = _quantity(parse_duration, "200ms", lambda seconds: seconds > 0, "> 0")
_below_one = _quantity(parse_ratio, "40%", lambda share: 0 <= share < 1, "at least 0 and below 1 (100%)")
_share = _quantity(parse_ratio, "90%", lambda share: 0 < share <= 1, "above 0 and at most 1 (100%)")
_named = "a ModelSpec, or the name of a model or a file"
_lengths = "a Workload, or a name, a file, or lengths such as '8000/300'"

LISTED = BeforeValidator(_listed)

# How values of a kind are checked, in the order in which pydantic applies what follows a type.
_CHECKS: Mapping[Kind, tuple[Any, ...]] = {
    Kind.CLUSTER: (PlainValidator(_instance_of((Cluster, str, os.PathLike), "a Cluster, or its file")),),
    Kind.MODEL: (PlainValidator(_instance_of((ModelSpec, str, os.PathLike), _named)),),
    Kind.WORKLOAD: (PlainValidator(_instance_of((Workload, str, os.PathLike), _lengths)),),
    Kind.FILE: (PlainValidator(_instance_of((str, os.PathLike), "a path")),),
    Kind.DRAFTS: (AfterValidator(_as_drafts),),
    Kind.DEMAND: (BeforeValidator(_plain), Field(ge=LEAST_DEMAND_RPS, allow_inf_nan=False)),
    Kind.RATE: (BeforeValidator(_plain), Field(gt=0, allow_inf_nan=False)),
    Kind.BURSTINESS: (BeforeValidator(_plain), Field(ge=0, le=MOST_BURSTINESS, allow_inf_nan=False)),
    Kind.TTFT: (_limit_on("TTFT"),),
    Kind.TPOT: (_limit_on("TPOT"),),
    Kind.SECONDS: (PlainValidator(_seconds),),
    Kind.SHARE: (PlainValidator(_share),),
    Kind.BELOW_ONE: (PlainValidator(_below_one),),
    Kind.GAP: (PlainValidator(_below_one),),
    Kind.HIT_RATE: (PlainValidator(_word_or(("trace",), _below_one)),),
    **dict.fromkeys((Kind.COUNT, Kind.TOKENS), (BeforeValidator(_plain), Field(ge=1))),
    Kind.COUNT_OR_ZERO: (BeforeValidator(_plain), Field(ge=0)),
}


def _checked_type(hint: Any) -> Any:
    """Return a type with the checks of its kinds, in which a single text stands for a list of texts."""
    origin, arguments, annotated = get_origin(hint), get_args(hint), cast(Any, Annotated)
    if origin is Annotated:
        kind, *of = arguments
        return annotated[kind, *(check for one in of for check in _CHECKS.get(one, (one,)))]
    if origin is Literal:
        return annotated[str, one_of(arguments)]
    if origin in (Union, UnionType):
        return reduce(or_, map(_checked_type, arguments))
    if origin is Sequence:
        inner: Any = _checked_type(arguments[0])
        listed = cast(Any, Sequence)[inner]
        return listed if get_origin(inner) is Annotated and get_args(inner)[0] is int else annotated[listed, LISTED]
    return hint
