"""Options made from the fields of a `PlacementRequest`: one by one, and as groups that give a verb such a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, make_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from hetis.commands import groups
from hetis.commands import verb as command_line
from hetis.planner.cli.parameters import values
from hetis.planner.use_cases.request import (
    FIELDS,
    LIMITS,
    Goal,
    Loss,
    PlacementRequest,
    RungName,
    StatisticName,
    Target,
)
from hetis.solver.plan import DEFAULT_STRATEGY

if TYPE_CHECKING:
    from hetis.solver.problem import EngineRules

NAMES = {"profiles": "profile"}  # parameters whose names differ from those of fields, by which variables set them

# How values on the command line are read: by a parser, or by typer from a type. Fields of one value that is a text
# need neither.
_READ: Mapping[str, Mapping[str, Any]] = {
    "model": {"autocompletion": values.model_names},
    "workload": {"autocompletion": values.workload_names},
    "prefix_hit_rate": {"parser": values.prefix_hit_rate},
    "weights": {"parser": values.weights, "autocompletion": values.weights_names},
    "kv": {"parser": values.kv, "autocompletion": values.kv_names},
    "mtp": {"parser": values.mtp},
    "profiles": {"type": list[str]},
    "objective": {"type": Goal},
    "rate": {"parser": values.demand},
    "ttft": {"parser": values.ttft_limit},
    "tpot": {"parser": values.tpot_limit},
    "ttft_statistic": {"type": StatisticName},
    "tpot_statistic": {"type": StatisticName},
    "attainment": {"parser": values.share},
    "pin": {"type": list[str], "autocompletion": values.pinned_things},
    "forbid": {"type": list[str], "autocompletion": values.forbidden_things},
    "price_pins": {"type": bool},
    "survive": {"type": Loss},
    "keep": {"parser": values.share},
    "rung": {"type": RungName},
    "worth": {"parser": values.below_one},
    "target": {"type": Target},
    "strategy": {"parser": values.strategy, "autocompletion": values.strategy_names},
    "roles": {"parser": values.roles, "autocompletion": values.role_names},
    "engine": {"parser": values.engine, "autocompletion": values.engine_names},
    "max_stages": {"type": int, "min": 1, "max": 16},
    "max_gpus": {"type": int, "min": 1},
    "min_layers": {"type": int, "min": 1},
    "max_nodes": {"type": int, "min": 1},
    "max_num_seqs": {"parser": values.setting},
    "chunk_tokens": {"parser": values.chunks},
    "kv_blocks": {"parser": values.setting},
    "min_context": {"parser": values.tokens},
    "gpu_memory_utilization": {"parser": values.share},
    "simplest_within": {"parser": values.below_one},
    "time_limit": {"parser": values.positive_duration},
    "gap": {"parser": values.gap},
    "seed": {"type": int, "min": 0},
    "profile_error": {"parser": values.below_one},
    "verify": {"type": bool},
    "other_engines": {"type": bool},
}


def requested(name: str, **others: Any) -> Any:
    """Declare a field of a group as the option of a request's field.

    ``others`` are its default, or what is shown as such, if these are not the request's.
    """
    one = FIELDS[name]
    default = ... if one.default is MISSING else None if one.default in ((), "", "default") else one.default
    how = {how: value for how, value in _READ.get(name, {}).items() if how != "type"}
    declared = {"default": default, "panel": one.metadata["panel"], "shown": one.metadata["shown"], **how}
    return groups.option(one.metadata["usage"], **(declared | others))


def _type_of(name: str) -> Any:
    """Return the type by which typer reads a field; any, if it has a parser."""
    if "parser" in (read := _READ.get(name, {})):
        return Any
    kind = read.get("type", str)
    return kind | None if FIELDS[name].default in (None, (), "") else kind


def request_options(*names: str, **others: Any) -> Any:
    """Return a group of options, for fields of these names, that a verb receives as a `PlacementRequest`.

    Options that are not given have the field's default. ``others`` are optional fields that are declared otherwise.
    """
    declared = [
        (NAMES.get(name, name), _type_of(name) | None if name in others else _type_of(name), option)
        for name in names
        for option in [others.get(name) or requested(name)]
    ]
    made = make_dataclass("RequestOptions", declared, kw_only=True, eq=False, repr=False)

    def request(_: Any, **given: Any) -> PlacementRequest:
        fields_of = {name: field for field, name in NAMES.items()}
        known = {fields_of.get(name, name): value for name, value in given.items() if value is not None}
        return PlacementRequest(**{"cluster": "", "model": "", "workload": "", **known})

    made.__new__ = request  # type: ignore[method-assign, assignment]
    return made


INPUTS = ("cluster", "model", "workload", "prefix_hit_rate", "weights", "kv", "mtp", "profiles")
GOAL = ("objective", "rate", "ttft", "tpot")
LEVEL = ("ttft_statistic", "tpot_statistic", "attainment")
CONSTRAINTS = ("pin", "forbid", "rung")
FAMILY = ("strategy", "roles", "engine")
RUNGS = ("rung", "worth", "target")
REPLICAS = (*LIMITS, "max_num_seqs", "chunk_tokens", "kv_blocks")
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
    given = command_line.given.get()
    option = {name: one.metadata["usage"].split()[0].rstrip(":") for name, one in FIELDS.items()}
    return {name: option[name] for name in FIELDS if NAMES.get(name, name) in given}


def engine_of(request: PlacementRequest) -> EngineRules | None:
    """Return the rules of the requested engine; None for published heuristics.

    Raises:
        typer.BadParameter: there is no such engine, or limits are specified for a published heuristic.
    """
    return engine_rules(request.engine, request.strategy, request.limits)


def rules_of_engine(name: str, limits: Mapping[str, int | None]) -> EngineRules:
    """Return the rules of a named engine and the limits."""
    rules = engine_rules(name, DEFAULT_STRATEGY, limits)
    assert rules is not None, "it is named"
    return rules


def engine_rules(name: str | None, strategy: str, limits: Mapping[str, int | None]) -> EngineRules | None:
    """Return the rules of ``--engine`` and the limits, as `engine_of`."""
    from hetis.planner.use_cases.sources import engine_rules as rules_of
    from hetis.solver.errors import InvalidProblemError

    try:
        return rules_of(name, strategy, **limits)
    except InvalidProblemError as error:
        raise typer.BadParameter(str(error)) from None
