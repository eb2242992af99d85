"""A request for a plan: every field with its type, kind, default and help, stated once.

Options of `hetis-plan place`, and of other verbs that plan, are made from these fields, and with them the names in
``hetis.toml`` (`hetis.planner.cli.parameters.requests`); so are the arguments of `hetis.place`
(`hetis.planner.library.placing`). A PlanSpec has those that a planner offers (`hetis.planner.convert.plan_specs`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from enum import Enum, auto
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, dataclass_transform, get_type_hints

from hetis.commands.groups import option
from hetis.formats.units import parse_duration, parse_limit, parse_ratio
from hetis.planner.use_cases.service_level import DEFAULT, ServiceLevel, Statistic, requested_level
from hetis.solver.goals import GoalName
from hetis.solver.plan import DEFAULT_STRATEGY, DEFAULT_TIME_LIMIT_S, Objective, ObjectiveKind, Role

if TYPE_CHECKING:
    from hetis.formats.traces import PrefixHitRate
    from hetis.simulator.values import RouterName
    from hetis.solver.cluster import Cluster
    from hetis.solver.model import ModelSpec
    from hetis.solver.workload import Workload

T = TypeVar("T")

# Tests keep these names in step with the enumerations and catalogues that they are from.
RoleName = Literal["unified", "prefill", "decode"]
StatisticName = Literal["mean", "p50", "p90", "p95", "p99"]
Loss = Literal["node", "zone"]
RungName = Literal["node", "pipelines", "apart", "workers"]
Target = Literal[
    "vllm", "sglang", "compose", "kubernetes", "lws", "llm-d", "kserve", "dynamo", "ray", "slurm", "hetis-launch"
]
# The routers of export targets that do not have nginx alone: SGLang's router pairs replicas, KServe's gateway draws by
# weight, Dynamo's front end looks at load alone.
ROUTERS: Mapping[str, RouterName] = {
    "sglang": "sglang",
    "llm-d": "llm-d",
    "kserve": "weighted-random",
    "dynamo": "fewest-requests",
}
StrategyName = Literal[
    "hetis", "uniform", "hexgen", "hexgen2", "splitwise", "splitwise-paper", "hexgen-paper", "hexgen2-paper",
    "hetis-paper",
]  # fmt: skip
EngineName = Literal["vllm-hetis", "vllm", "sglang"]
Path = str | os.PathLike[str]


class Kind(Enum):
    """What values of a type may be, if that is more than the type says; how command lines and programs check it."""

    CLUSTER = auto()
    MODEL = auto()
    WORKLOAD = auto()
    FILE = auto()
    WEIGHTS = auto()
    KV = auto()
    DRAFTS = auto()
    DEMAND = auto()
    RATE = auto()
    BURSTINESS = auto()
    TTFT = auto()
    TPOT = auto()
    SECONDS = auto()
    SHARE = auto()  # above 0
    BELOW_ONE = auto()
    GAP = auto()
    HIT_RATE = auto()
    COUNT = auto()
    COUNT_OR_ZERO = auto()
    TOKENS = auto()


Quantity = float | str  # a number, or text with a unit
File = Annotated[Path, Kind.FILE]
Demand = Annotated[float, Kind.DEMAND]
Rate = Annotated[float, Kind.RATE]
Share = Annotated[Quantity, Kind.SHARE]
BelowOne = Annotated[Quantity, Kind.BELOW_ONE]
Seconds = Annotated[Quantity, Kind.SECONDS]
Count = Annotated[int, Kind.COUNT]
CountOrZero = Annotated[int, Kind.COUNT_OR_ZERO]

NO_LIMIT = float("inf")
DEFAULT_TTFT_S = 2.0
DEFAULT_TPOT_S = 0.1
LEAST_TO_SIMULATE_S = 30.0  # however short the time limit; most plans of small fleets need seconds
TO_SIMULATE_S = 120.0  # if no time limit was requested: a plan with attention workers that misses a limit needs minutes
LIMITS = ("max_stages", "max_gpus", "min_layers", "max_nodes")  # the fields of `EngineRules` that users may set
_input, _goal, _search, _result = (partial(option, panel=name) for name in ("Inputs", "Goal", "Search", "Result"))


@dataclass_transform(frozen_default=True, field_specifiers=(option,))
def request(kind: type[T]) -> type[T]:
    return dataclass(frozen=True)(kind)


@request
class PlacementRequest:
    """A request for a plan, as written by users: quantities may be text with a unit.

    Some checks need others to be known; `hetis.planner.use_cases.place` makes those.
    """

    cluster: Annotated[Cluster | Path, Kind.CLUSTER] = option("--cluster -c FILE: The fleet.", ..., panel="Inputs")
    model: Annotated[ModelSpec | Path, Kind.MODEL] = option(
        "--model -m NAME|FILE: A name of `catalog models`, a ModelSpec file, or a Hugging Face config.json.",
        ...,
        panel="Inputs",
    )
    workload: Annotated[Workload | Path, Kind.WORKLOAD] = option(
        "--workload -w NAME|FILE|P/O: "
        "A name of `catalog workloads`, a Workload file, a trace, or mean lengths such as 8000/300.",
        ...,
        panel="Inputs",
    )
    _: KW_ONLY
    classes: str = _input(
        "--classes CUTS: "
        "Try pools for classes of requests by prompt length, cut at percentiles: p90, p50,p90, auto (what pays), none.",
        "",
        shown="the workload's",
    )
    prefix_hit_rate: Annotated[Quantity, Kind.HIT_RATE] | None = _input(
        "--prefix-hit-rate SHARE|trace: "
        "Share of prompt tokens that prefix caches hold: 0.4, 40%, or trace to count it by a Mooncake trace's hash "
        "ids.",
        shown="the workload's, or 0",
    )
    burstiness: Annotated[float, Kind.BURSTINESS] | None = _input(
        "--burstiness CV: "
        "Coefficient of variation of the gaps between arrivals: 1 at random (Poisson), above 1 in bursts; at most 10.",
        shown="the workload's, or 1",
    )
    weights: Annotated[str, Kind.WEIGHTS] | None = _input(
        "--weights P[,GPU=P...]: "
        "Precision of the weights, in general and per GPU type: bf16, fp8, int8, int4, awq-int4, gptq-int4, "
        "mxfp4, nvfp4, bnb-int4, bnb-int8, fbgemm-fp8.",
        shown="the checkpoint's",
    )
    kv: Annotated[str, Kind.KV] | None = _input(
        "--kv P[,GPU=P...]: Precision of the KV cache, in general and per GPU type: bf16 or fp8.",
        shown="the checkpoint's",
    )
    mtp: Annotated[str, Kind.DRAFTS] | None = _input(
        "--mtp K:RATE: "
        "Multi-token prediction by layers of the model: K drafts per step and their acceptance rate, such as 1:0.85.",
        shown="no drafts",
    )
    profiles: Sequence[File] = _input(
        "--profile FILE: Profile of a GPU type; repeatable. Other types use their shipped profile, or are modelled.", ()
    )
    objective: GoalName = _goal(f"--objective GOAL: Objective of the plan: {', '.join(ObjectiveKind)}.", "goodput")
    rate: Demand | None = _goal(
        "--rate R: Demanded requests/s; required by the objectives cost and gpus. Others show whether it is met."
    )
    ttft: Annotated[Quantity, Kind.TTFT] | None = _goal(  # None: no limit
        "--ttft TIME|none: Limit of the p95 time to first token.", "default", shown="2s; throughput: none"
    )
    tpot: Annotated[Quantity, Kind.TPOT] | None = _goal(
        "--tpot TIME|none: Limit of the mean time per output token.", "default", shown="100ms; throughput: none"
    )
    ttft_statistic: StatisticName | None = _goal(
        "--ttft-statistic: Statistic of TTFT that must keep its limit in simulation.", shown=DEFAULT.ttft
    )
    tpot_statistic: StatisticName | None = _goal(
        "--tpot-statistic: Statistic of TPOT that must keep its limit in simulation.", shown=DEFAULT.tpot
    )
    attainment: Share | None = _goal(
        "--attainment SHARE: "
        "Share of simulated requests that must keep all limits (SLO attainment), instead of statistics; such as 90%."
    )
    pin: Sequence[str] = _goal(
        "--pin CONSTRAINT: "
        "node=|type=|zone= and :use=N (at least N GPUs in use) or :as=worker, primary, prefill, decode, unified "
        "(nothing else); replicas=N or N..M; usd=..N per hour; gpus=..N. Repeatable.",
        (),
    )
    forbid: Sequence[str] = _goal(
        "--forbid CONSTRAINT: "
        "gpu=NODE/INDEX, node=, type=, zone= (not used, or not :as=worker, ...); tp=N; workers; shared-experts. "
        "Repeatable.",
        (),
    )
    survive: Literal["", Loss] = _goal(
        "--survive: "
        "Serve most after losing any one node or zone or, with --objective cost or gpus, still serve --rate.",
        "",
    )
    keep: Share | None = _goal(
        "--keep SHARE: With --survive: serve most of all plans of which at least this share is left."
    )
    rung: Literal["", RungName] = _search(
        "--rung NAME: "
        "The most complex replicas: node (each in one node), pipelines (over several), apart (prefill and decode), or "
        "workers (for attention).",
        "",
        shown="the highest that is worth it",
    )
    worth: BelowOne = _search(
        "--worth SHARE: "
        "What a higher rung must gain to be the default: more requests/s, or the demand for less, also under the "
        "profiles' errors, with no less left without the worst node, nor less than half of its service.",
        "10%",
    )
    target: Literal["", Target] = _search(
        "--for TARGET: Only plans that this export target carries wholly, at the rate kept behind its router.",
        "",
        shown="any target",
    )
    strategy: StrategyName = _search(
        "--strategy NAME: Family of plans to search, a name of `catalog strategies`.", DEFAULT_STRATEGY
    )
    roles: Sequence[RoleName] = _search(
        "--roles ROLE,...: Roles that replicas may have: unified, or prefill,decode, or all three.",
        (),
        shown="all that the strategy has",
    )
    engine: EngineName | None = _search(
        "--engine NAME: Plan only what this engine can run: vllm-hetis (with attention workers), vllm or sglang.",
        shown="vllm-hetis; none for published heuristics",
    )
    max_stages: Count | None = _search(
        "--max-stages N: Maximum stages of a replica, in plans for an engine.",
        shown="8; fewer where kinds of GPUs are many",
        min=1,
        max=16,
    )
    max_gpus: Count | None = _search(
        "--max-gpus N: Maximum GPUs of a replica including attention workers, in plans for an engine.", min=1
    )
    min_layers: Count | None = _search(
        "--min-layers-per-stage N: Minimum layers of a stage, in plans for an engine.",
        shown="4 of each of several stages, unless nothing else fits",
        min=1,
    )
    max_nodes: Count | None = _search(
        "--max-nodes-per-replica N: Maximum nodes of a replica including attention workers, in plans for an engine.",
        min=1,
    )
    kv_between_vendors: bool = _search(
        "--kv-between-vendors: Let prefill replicas send KV to GPUs of other vendors (vLLM; 16-bit KV, by Triton's "
        "kernels).",
        False,
    )
    max_num_seqs: Count | None = _search(
        "--max-num-seqs N: Maximum requests that an engine runs at once (a replica, or each copy that shares experts)."
    )
    chunk_tokens: Sequence[Count] = _search(
        "--chunk-tokens N[,N...]: Prompt tokens per iteration: vLLM's --max-num-batched-tokens less what decodes.",
        (),
        shown="256,512,2048",
    )
    kv_blocks: Count | None = _search(
        "--kv-blocks N: "
        "Maximum KV blocks of 16 tokens of an engine (of each copy that shares experts), as --num-gpu-blocks-override.",
        shown="what memory allows",
    )
    min_context: Annotated[int, Kind.TOKENS] | None = _search(
        "--min-context N: Tokens of the longest request for which every replica has room, such as 32k.",
        shown="as it comes",
    )
    gpu_memory_utilization: Share | None = _search(
        "--gpu-memory-utilization SHARE: Share of the GPUs' memory that engines take.",
        shown="the engine's: 0.92 of vLLM",
    )
    simplest_within: BelowOne = _search(
        "--simplest-within SHARE: "
        "Loss against the best plan, such as 10%, to accept for the simplest plan: least lost with a node, few shapes.",
        "0",
    )
    time_limit: Seconds | None = _search(
        "--time-limit TIME: Return the best plan found by then.", shown=f"{DEFAULT_TIME_LIMIT_S:g}s"
    )
    gap: Annotated[Quantity, Kind.GAP] = _search(
        "--gap GAP: Stop when the plan is proven this close to the best; 0.5% or 0.005.", "0.1%"
    )
    seed: CountOrZero = _search("--seed N: Random seed; the same seed gives the same plan.", 0, min=0)
    verify: bool = _result(
        "--verify/--no-verify: Simulate the plan at its planned rate and report whether the limits are kept.", True
    )

    @property
    def goal(self) -> Objective:
        """The objective with its default limits."""
        limits_s = {f"{name}_s": limit_s for name, limit_s in self.limits_s.items()}
        return objective(ObjectiveKind(self.objective), demand_rps=self.rate, **limits_s)

    @property
    def limits_s(self) -> dict[str, float | None]:
        """The limits on ``ttft`` and ``tpot`` in seconds, `NO_LIMIT` if there is none; None: the default."""
        return {"ttft": _limit(self.ttft, "TTFT"), "tpot": _limit(self.tpot, "TPOT")}

    @property
    def service_level(self) -> ServiceLevel:
        """The level that simulated traffic must keep.

        Raises:
            InvalidProblemError: it contradicts itself, or nothing is simulated.
        """
        ttft, tpot = (None if one is None else Statistic(one) for one in (self.ttft_statistic, self.tpot_statistic))
        attainment = None if self.attainment is None else ratio_of(self.attainment)
        return requested_level(ttft=ttft, tpot=tpot, attainment=attainment, objective=self.goal, verify=self.verify)

    def check(self) -> None:
        """Raise InvalidProblemError if fields contradict each other."""
        assert self.service_level

    @property
    def hit_rate(self) -> PrefixHitRate | None:
        """The prefix hits that replace the workload's own; None: keep those."""
        given = self.prefix_hit_rate
        return None if given is None else "trace" if given == "trace" else ratio_of(given)

    @property
    def all_roles(self) -> tuple[Role, ...]:
        """The roles in the order in which families list them, without duplicates; empty: all of the strategy."""
        return tuple(role for role in Role if role.value in self.roles)

    @property
    def limits(self) -> dict[str, int | None]:
        """The limits on replicas, by the names of `EngineRules`."""
        return {name: getattr(self, name) for name in LIMITS}

    @property
    def time_limit_s(self) -> float:
        """The seconds of one search."""
        given = self.time_limit
        return DEFAULT_TIME_LIMIT_S if given is None else parse_duration(given) if isinstance(given, str) else given

    @property
    def simulation_limit_s(self) -> float:
        """The seconds after which simulations, with the searches that follow them, are stopped on a slow machine."""
        return TO_SIMULATE_S if self.time_limit is None else max(LEAST_TO_SIMULATE_S, self.time_limit_s)

    @property
    def simulated_tens(self) -> float:
        """How many times ten seconds of work simulations may take: once, or as long as a given time limit."""
        return 1.0 if self.time_limit is None else max(1.0, self.time_limit_s / 10.0)


FIELDS = {one.name: one for one in fields(PlacementRequest)}


@cache
def types_of_fields() -> dict[str, Any]:
    """Return the types of the fields, with the kinds of their values; documents, which load much, are of any type."""
    documents = dict.fromkeys(("Cluster", "ModelSpec", "Workload"), object)
    hints = get_type_hints(PlacementRequest, localns=documents, include_extras=True)
    return {name: hints[name] for name in FIELDS}


def path_or_value(given: T | Path) -> T | str:
    """Return a path as text, and anything else as it is."""
    return os.fspath(given) if isinstance(given, str | os.PathLike) else given


def ratio_of(given: Quantity) -> float:
    return parse_ratio(given) if isinstance(given, str) else float(given)


def objective(
    kind: ObjectiveKind, *, ttft_s: float | None, tpot_s: float | None, demand_rps: float | None
) -> Objective:
    """Return the objective with its default limits. A limit of None is the default, infinity means no limit."""
    defaults = (None, None) if kind is ObjectiveKind.THROUGHPUT else (DEFAULT_TTFT_S, DEFAULT_TPOT_S)
    ttft, tpot = (
        default if given is None else None if given == NO_LIMIT else given
        for given, default in zip((ttft_s, tpot_s), defaults, strict=True)
    )
    return Objective(kind=kind, ttft_limit_s=ttft, tpot_limit_s=tpot, demand_rps=demand_rps)


def _limit(given: Quantity | None, name: str) -> float | None:
    """Return a limit in seconds, `NO_LIMIT` if there is none; None: the default."""
    if given == "default":
        return None
    if given is None or given == "none":
        return NO_LIMIT
    return parse_limit(given, name) if isinstance(given, str) else float(given)
