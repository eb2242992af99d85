"""Values in the record of a plan, and the forms of its entries: how each is read from plan files and written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hetis.formats.errors import shown
from hetis.planner.use_cases.json_values import json_value
from hetis.planner.use_cases.service_level import Latency, ServiceLevel, Statistic
from hetis.simulator.values import RouterName
from hetis.solver.advice import Loss
from hetis.solver.engine_rules import NOTHING_SET, EngineRules, EngineSettings
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Role
from hetis.solver.plugin_time import PluginTime

PLACES = ("node", "zone")  # kinds of places whose loss a plan may have to survive
MAY_DIFFER = ("tpot_limit_s", "demand_rps")  # the fields of an objective that may have been requested otherwise
SHARE = "gpu_memory_utilization"


class UnreadableError(ValueError):
    """An entry has another form than its field: what follows its name in messages, once for each problem.

    Without any, no plan is checked against the entry, and what is written there means nothing.
    """

    def __init__(self, *rests: str) -> None:
        super().__init__("; ".join(rests))
        self.rests = rests


def read_as(kind: Any, data: Any) -> Any:
    """Return JSON data as a value of a type: dataclasses from their fields, beside which others are ignored.

    Dataclasses in another form are left out of lists and mappings, since reports calculate with what these hold.

    Raises:
        UnreadableError: the data has another form.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, UnionType):
        return None if data is None else read_as(next(one for one in args if one is not NoneType), data)
    if origin is tuple and isinstance(data, list):
        return tuple(_items(args[0], enumerate(data)).values())
    if origin is Mapping and isinstance(data, Mapping):
        return _items(args[1], data.items())
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(data, Mapping):
        try:
            return kind(**{name: read_as(of, data[name]) for name, of in types_of(kind).items() if name in data})
        except (TypeError, ValueError):  # a field is missing, or the value is refused
            raise UnreadableError from None
    if origin is Literal and data in args:
        return data
    if kind in (int, float) and is_number(data) and abs(data) <= sys.float_info.max and kind(data) == data:
        return data
    if kind in (str, bool) and isinstance(data, kind):
        return data
    raise UnreadableError


@cache
def types_of(kind: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    return get_type_hints(kind)


def _items(kind: Any, items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict[Any, Any]()
    for key, data in items:
        try:
            found[key] = read_as(kind, data)
        except UnreadableError:
            if not is_dataclass(kind):
                raise
    return found


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def one_of(names: Collection[str]) -> Callable[[Any], str]:
    """Return a reader of a name, which is empty for any other value."""
    return lambda data: data if isinstance(data, str) and data in names else ""


def read_roles(data: Any) -> tuple[Role, ...]:
    known = [role.value for role in Role]
    if not isinstance(data, list) or not data or not all(name in known for name in data):
        raise UnreadableError(f" must be a list of {', '.join(known)}: the plan is checked against them")
    return tuple(role for role in Role if role.value in data)


def read_engine(data: Any) -> EngineRules | None:
    if data is None:
        return None
    if isinstance(data, dict):
        for name in ("max_stages", "max_pooled_stages", "max_gpus", "min_layers", "max_nodes"):
            value, may_be_null = data.get(name, 0), name in ("max_gpus", "max_nodes")  # null: no limit
            if type(value) is not int and not (value is None and may_be_null):
                must = "a whole number or null" if may_be_null else "a whole number"
                raise UnreadableError(f".{name} is {shown(value)}, must be {must}")
    try:
        return engine_from_data(data)
    except (TypeError, InvalidProblemError) as error:
        raise UnreadableError(f" must be an engine and its limits: {error}") from None


def engine_from_data(data: Mapping[str, Any]) -> EngineRules:
    """Return the rules from which `asdict` made data; earlier versions charged nothing for the plugin."""
    if not isinstance(data, Mapping):
        raise TypeError(f"is a {type(data).__name__}, must have names and numbers")
    vendors = data.get("kv_vendors", ())
    if not isinstance(vendors, list | tuple) or not all(isinstance(vendor, str) for vendor in vendors):
        raise TypeError(f"kv_vendors is {shown(vendors)}, must be a list of vendors")
    return EngineRules(**{**data, "plugin": PluginTime(**data.get("plugin", {})), "kv_vendors": tuple(vendors)})


def engine_settings_from_data(data: Any) -> EngineSettings:
    """Return the settings from which `engine_settings_data` made data.

    Raises:
        UnreadableError: the data has a different form, or a number is out of its range.
    """
    try:
        if data is None:
            return NOTHING_SET
        if not isinstance(data, Mapping):
            raise TypeError(f"is a {type(data).__name__}, must have names and numbers")
        chunks, share = data.get("chunk_tokens", []), data.get(SHARE)
        if not isinstance(share, float | int | None):
            raise TypeError(f"has a {SHARE} that is no number")
        numbers = {name: value for name, value in data.items() if name not in ("chunk_tokens", SHARE)}
        if not isinstance(chunks, list | tuple) or not all(type(one) is int for one in (*chunks, *numbers.values())):
            raise TypeError("has a value that is not a whole number")
        return EngineSettings(chunk_tokens=tuple(chunks), gpu_memory_utilization=share, **numbers)
    except (TypeError, InvalidProblemError) as error:
        raise UnreadableError(f" must be engine settings: {error}") from None


def engine_settings_data(settings: EngineSettings) -> dict[str, Any]:
    """Return the specified settings by name."""
    found = {name: value for name, value in asdict(settings).items() if value}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def read_constraints(data: Any) -> tuple[str, ...]:
    if not isinstance(data, list) or not all(isinstance(text, str) for text in data):
        raise UnreadableError(" must be a list of --pin and --forbid options: the plan is checked against them")
    return tuple(data)


def service_level_from_data(data: Any) -> ServiceLevel:
    """Return the level from which `asdict` made data. Raises UnreadableError: it has a different form."""
    names, known = [one.name for one in fields(ServiceLevel)], [one.value for one in Statistic]
    if not isinstance(data, Mapping) or set(data) != set(names):
        raise UnreadableError(f": must have {', '.join(names)}, and nothing else")
    wrong = [
        f": {name} is {shown(data[name])}, must be one of {', '.join(known)}"
        for name in ("ttft", "tpot")
        if data[name] not in known
    ]
    share = data["attainment"]
    if share is not None and not (type(share) in (int, float) and 0.0 < share <= 1.0):
        wrong.append(f": attainment is {shown(share)}, must be null, or above 0 and at most 1")
    if wrong:
        raise UnreadableError(*wrong)
    return ServiceLevel(ttft=Statistic(data["ttft"]), tpot=Statistic(data["tpot"]), attainment=share)


def read_requested(data: Any) -> Mapping[str, float]:
    if not isinstance(data, Mapping) or not data.keys() <= set(MAY_DIFFER) or not all(map(is_number, data.values())):
        raise UnreadableError(f" is {shown(data)}, must have numbers by {' or '.join(MAY_DIFFER)}")
    return data


@dataclass(frozen=True, slots=True)
class Searched:
    """The result of a search that ended: the value of the best plan; None: there is no plan."""

    value: float | None


def read_searched(data: Any) -> Searched:
    return Searched(read_as(float | None, data))


def read_losses(data: Any) -> Mapping[str, Loss]:
    return {place: loss for place, loss in read_as(Mapping[str, Loss], data).items() if loss.whole > 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A range from the lowest to the highest value."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """The plan's results if its profiles are off by their stated errors."""

    rate: Range  # requests/s as counted by the objective; for cost and gpus the goodput
    ttft_s: Range  # TTFT of the worst replica, with micro-batches as planned
    tpot_s: Range  # TPOT of the worst replica, with micro-batches as planned
    errors: Mapping[str, Mapping[str, float]]  # errors used, by GPU type and operator; 0.1 is 10%
    assumed: tuple[str, ...]  # GPU types and operators (``L4 step``) whose error is assumed, since none is stated


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """What the errors of a plan's profiles mean: the range that they leave."""

    predicted: Predicted | None = None


def read_errors(data: Any) -> Errors:
    found = read_as(Mapping[str, Any], data)
    return Errors(predicted=_items(Predicted, [("", found.get("predicted"))]).get(""))


def errors_data(errors: Errors) -> dict[str, Any]:
    found = {one.name: json_value(getattr(errors, one.name)) for one in fields(Errors)}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A plan's behaviour under simulated arrivals at the rate that it promises."""

    rate_rps: float  # rate of the arrivals
    num_requests: int  # requests per run
    kept: bool  # whether the load was carried, with no latency above its limit by more than chance
    steady: bool | None  # whether the queue did not grow; None: the run was too short to tell
    ttft_p95_s: float  # over all requests of the run, after the warm-up
    tpot_mean_s: float  # over all requests of the run, after the warm-up
    attainment: float  # share of the requests within both limits
    kept_rps: float | None  # the highest rate that kept the limits in a simulation; None: none of those tried
    # The following fields are missing in earlier plans.
    ttft_s: float | None = None  # the statistic that must keep the limit, if that is not p95
    tpot_s: float | None = None  # the statistic that must keep the limit, if that is not the mean
    # The share of the requests over each limit, if a share of requests must keep them; None: there is no limit
    ttft_missed: float | None = None
    tpot_missed: float | None = None
    share: float | None = None  # share of the rate, at which as large a part of the replicas ran; None: all ran
    too_short: bool | None = None  # whether runs cannot fill even the seats of that part; None: they do
    dispatched: bool | None = None  # whether heads were dispatched per request; None: they were split as planned
    router: RouterName | None = None  # what sent requests to replicas; None: nginx

    def __post_init__(self) -> None:
        if not (0.0 <= self.attainment <= 1.0 and (self.share is None or 0.0 < self.share <= 1.0)):
            raise ValueError(f"attainment is {self.attainment}, share is {self.share}; they must be shares")

    def seconds(self, latency: Latency) -> float:
        """Return the simulated latency in the statistic that must keep the limit."""
        if latency is Latency.TTFT:
            return self.ttft_p95_s if self.ttft_s is None else self.ttft_s
        return self.tpot_mean_s if self.tpot_s is None else self.tpot_s


LITTLE_LEFT = 0.5  # share of its service that a loss has to leave: less is red, and not a default


@dataclass(frozen=True, slots=True, kw_only=True)
class RungFound:
    """What the best plan of a rung reaches.

    Attributes:
        name: the rung.
        why_not: why it has no plan of its own; empty: it has one.
        value, bound: in the objective's unit.
        rate_rps: the planned rate.
        usd_per_hour: price of the used GPUs; None: at least one has no price.
        gpus: GPUs used.
        left_rps: the planned rate that is left without the worst node.
        shapes: different replicas.
        nodes: the most nodes of a replica.
        of: the simplest rung that has all of its replicas.
        targets: the export targets that carry all of it; None: unknown.
        is_chosen: whether it is the rung of the plan.
    """

    name: str
    why_not: str = ""
    value: float | None = None
    bound: float | None = None
    rate_rps: float | None = None
    usd_per_hour: float | None = None
    gpus: int | None = None
    left_rps: float | None = None
    shapes: int | None = None
    nodes: int | None = None
    of: str = ""
    targets: tuple[str, ...] | None = None
    is_chosen: bool = False

    def __post_init__(self) -> None:
        if not self.why_not and None in (self.value, self.rate_rps, self.gpus, self.left_rps):
            raise ValueError(f"rung {self.name} has neither figures nor a reason for having none")

    @property
    def left_share(self) -> float:
        """Return the share of its rate that the plan keeps without the worst node."""
        return (self.left_rps or 0.0) / self.rate_rps if self.rate_rps else 0.0


# --- pools of classes of requests


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptWithClasses:
    """The highest rates that a plan without classes and one with them keep in a kind of traffic.

    ``counts``: whether a gain there is required.
    """

    traffic: str
    without_rps: float
    with_rps: float
    counts: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLatency:
    """The simulated p95 TTFT of a class in both plans, at a rate that both keep; ``share`` is that of its requests."""

    name: str
    share: float
    rate_rps: float
    without_s: float | None
    with_s: float | None
    limit_s: float | None = None
    max_prompt_tokens: int | None = None

    @property
    def pays(self) -> bool:
        """Return whether the class waits longer with classes."""
        return self.without_s is not None and self.with_s is not None and self.with_s > self.without_s
