"""Options made from the fields of a `PlacementRequest`: one by one, and as groups that give a verb such a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, make_dataclass
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast, get_args, get_origin

from hetis.commands import groups
from hetis.planner.cli.parameters import values
from hetis.planner.cli.parameters.options import given_in
from hetis.planner.use_cases.request import FIELDS, LIMITS, Kind, PlacementRequest, types_of_fields

NAMES = {"profiles": "profile"}  # parameters whose names differ from those of fields, by which variables set them

# Values of other kinds are texts, or numbers that the field's declaration limits.
_PARSERS: Mapping[Kind, Callable[[str], Any]] = {
    Kind.HIT_RATE: values.prefix_hit_rate,
    Kind.WEIGHTS: values.weights,
    Kind.KV: values.kv,
    Kind.DRAFTS: values.mtp,
    Kind.DEMAND: values.demand,
    Kind.BURSTINESS: values.burstiness,
    Kind.TTFT: values.ttft_limit,
    Kind.TPOT: values.tpot_limit,
    Kind.SHARE: values.share,
    Kind.BELOW_ONE: values.below_one,
    Kind.GAP: values.gap,
    Kind.SECONDS: values.positive_duration,
    Kind.TOKENS: values.tokens,
}
# Fields whose lists or names have forms of their own.
_OWN_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "strategy": values.strategy,
    "roles": values.roles,
    "engine": values.engine,
    "max_num_seqs": values.setting,
    "chunk_tokens": values.chunks,
    "kv_blocks": values.setting,
}


def requested(name: str, **others: Any) -> Any:
    """Declare a field of a group as the option of a request's field.

    ``others`` are its default, or what is shown as such, if these are not the request's.
    """
    one = FIELDS[name]
    default = ... if one.default is MISSING else None if one.default in ((), "", "default") else one.default
    how = {"default": default, "parser": _reading(name)[1]}
    return groups.option(**(one.metadata["option"] | how | others))


def _reading(name: str) -> tuple[Any, Callable[[str], Any] | None]:
    """Return the type by which typer reads a field, and its parser, with which the type does not matter."""
    kind: Any = types_of_fields()[name]
    is_optional = FIELDS[name].default in (None, (), "")
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        kind = cast(Any, Literal)[tuple(filter(None, get_args(kind)))]
    of, *kinds = get_args(kind) if get_origin(kind) is Annotated else [kind]
    parser = _OWN_PARSERS.get(name) or next((_PARSERS[each] for each in kinds if each in _PARSERS), None)
    if parser is not None:
        return Any, parser
    of = list[str] if get_origin(of) is Sequence else str if kinds and of is not int else of
    return of | None if is_optional else of, None


def request_options(*names: str, **others: Any) -> Any:
    """Return a group of options, for fields of these names, that a verb receives as a `PlacementRequest`.

    Options that are not given have the field's default. ``others`` are optional fields that are declared otherwise.
    """
    types = {name: _reading(name)[0] for name in names}
    declared = [
        (NAMES.get(name, name), kind | None if name in others else kind, others.get(name) or requested(name))
        for name, kind in types.items()
    ]
    made = make_dataclass("RequestOptions", declared, kw_only=True, eq=False, repr=False)

    def request(_: Any, **given: Any) -> PlacementRequest:
        fields_of = {name: field for field, name in NAMES.items()}
        known = {fields_of.get(name, name): value for name, value in given.items() if value is not None}
        return PlacementRequest(**{"cluster": "", "model": "", "workload": "", **known})

    made.__new__ = request  # type: ignore[method-assign, assignment]
    return made


INPUTS = ("cluster", "model", "workload", "prefix_hit_rate", "burstiness", "weights", "kv", "mtp", "profiles")
GOAL = ("objective", "rate", "ttft", "tpot")
LEVEL = ("ttft_statistic", "tpot_statistic", "attainment")
CONSTRAINTS = ("pin", "forbid", "rung")
FAMILY = ("strategy", "roles", "engine")
RUNGS = ("rung", "worth", "target")
REPLICAS = (*LIMITS, "kv_between_vendors", "max_num_seqs", "chunk_tokens", "kv_blocks")
MEMORY = ("min_context", "gpu_memory_utilization")
SEARCH = ("time_limit", "gap", "seed")

_to_solve = partial(groups.option, panel="To solve")

if TYPE_CHECKING:
    PlaceOptions: TypeAlias = PlacementRequest
    CompareOptions: TypeAlias = PlacementRequest
    WhatIfOptions: TypeAlias = PlacementRequest
    SearchOptions: TypeAlias = PlacementRequest
    ApplyOptions: TypeAlias = PlacementRequest
else:
    PlaceOptions = request_options(*FIELDS)
    CompareOptions = request_options(*INPUTS, *GOAL, *LEVEL, *CONSTRAINTS, *REPLICAS, *MEMORY, *SEARCH, "verify")
    WhatIfOptions = request_options(*INPUTS, *GOAL, *FAMILY, *RUNGS, *REPLICAS, *MEMORY, *SEARCH)
    SearchOptions = request_options(*SEARCH)
    ApplyOptions = request_options(
        *INPUTS, *GOAL, *LEVEL, "survive", "keep", "verify", *FAMILY, *RUNGS, *REPLICAS, *SEARCH,
        cluster=_to_solve(
            "--cluster -c FILE|NAME: The fleet: a file, which is applied first, or an existing cluster."
        ),
        model=_to_solve("--model -m NAME|FILE: As for `place`."),
        workload=_to_solve("--workload -w NAME|FILE|P/O: As for `place`."),
        profiles=_to_solve(
            "--profile FILE|NAME: "
            "Profile to use: a file, which is applied first, or an existing profile; repeatable."
        ),
    )  # fmt: skip


def options_given() -> dict[str, str]:
    """Return the options of request fields that the command line gives, by the fields."""
    return given_in(PlacementRequest, renamed=NAMES)
