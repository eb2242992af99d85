"""A request for a plan: every field with its type, default and help, stated once.

Options of `hetis-plan place`, and of other verbs that plan, are made from these fields, and with them the names in
``hetis.toml`` (`hetis.planner.cli.parameters.requests`); so are the arguments of `hetis.place`
(`hetis.planner.library.placing`). A PlanSpec has those that a planner offers (`hetis.planner.convert.plan_specs`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, dataclass_transform

from hetis.formats.units import parse_duration, parse_limit, parse_ratio
from hetis.planner.use_cases.service_level import DEFAULT, ServiceLevel, Statistic, requested_level
from hetis.solver.plan import DEFAULT_STRATEGY, DEFAULT_TIME_LIMIT_S, Objective, ObjectiveKind, Role

if TYPE_CHECKING:
    from hetis.formats.traces import PrefixHitRate
    from hetis.solver.cluster import Cluster
    from hetis.solver.model import ModelSpec
    from hetis.solver.workload import Workload

T = TypeVar("T")

# Tests keep these names in step with the enumerations and catalogues that they are from.
Goal = Literal["goodput", "throughput", "cost", "gpus"]
RoleName = Literal["unified", "prefill", "decode"]
StatisticName = Literal["mean", "p50", "p90", "p95", "p99"]
Loss = Literal["node", "zone"]
RungName = Literal["node", "pipelines", "apart", "workers"]
Target = Literal[
    "vllm", "sglang", "compose", "kubernetes", "lws", "llm-d", "kserve", "dynamo", "ray", "slurm", "hetis-launch"
]
StrategyName = Literal[
    "hetis", "uniform", "hexgen", "hexgen2", "splitwise", "splitwise-paper", "hexgen-paper", "hexgen2-paper",
    "hetis-paper",
]  # fmt: skip
EngineName = Literal["vllm-hetis", "vllm", "sglang"]
Path = str | os.PathLike[str]
Quantity = float | str  # a number, or text with a unit

NO_LIMIT = float("inf")
DEFAULT_TTFT_S = 2.0
DEFAULT_TPOT_S = 0.1
LEAST_TO_SIMULATE_S = 30.0  # however short the time limit; most plans of small fleets need seconds
TO_SIMULATE_S = 120.0  # if no time limit was requested: a plan with attention workers that misses a limit needs minutes
LIMITS = ("max_stages", "max_gpus", "min_layers", "max_nodes")  # the fields of `EngineRules` that users may set


def given(usage: str, *, panel: str, shown: str | Literal[True] = True, default: Any = ...) -> Any:
    """Declare a field: its option, the form of its value and its help as ``--rate R: Demanded requests/s.``

    ``panel`` is its part of the help, and ``shown`` the default as displayed there. Without ``default`` it is needed.
    """
    metadata = {"usage": usage, "panel": panel, "shown": shown}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, field_specifiers=(given,))
def request(kind: type[T]) -> type[T]:
    return dataclass(frozen=True)(kind)


@request
class PlacementRequest:
    """A request for a plan, as written by users: quantities may be text with a unit.

    Some checks need others to be known; `hetis.planner.use_cases.place` makes those.
    """

    cluster: Cluster | Path = given("--cluster -c FILE: The fleet.", panel="Inputs")
    model: ModelSpec | Path = given(
        "--model -m NAME|FILE: A name of `catalog models`, a ModelSpec file, or a Hugging Face config.json.",
        panel="Inputs",
    )
    workload: Workload | Path = given(
        "--workload -w NAME|FILE|P/O: "
        "A name of `catalog workloads`, a Workload file, a trace, or mean lengths such as 8000/300.",
        panel="Inputs",
    )
    _: KW_ONLY
    classes: str = given(
        "--classes CUTS: "
        "Try pools for classes of requests by prompt length, cut at percentiles: p90, p50,p90, auto (what pays), none.",
        panel="Inputs",
        shown="the workload's",
        default="",
    )
    prefix_hit_rate: Quantity | None = given(
        "--prefix-hit-rate SHARE|trace: "
        "Share of prompt tokens that prefix caches hold: 0.4, 40%, or trace to count it by a Mooncake trace's hash "
        "ids.",
        panel="Inputs",
        shown="the workload's, or 0",
        default=None,
    )
    weights: str | None = given(
        "--weights P[,GPU=P...]: "
        "Precision of the weights, in general and per GPU type: bf16, fp8, int8, int4, awq-int4, gptq-int4, "
        "mxfp4, nvfp4, bnb-int4, bnb-int8, fbgemm-fp8.",
        panel="Inputs",
        shown="the checkpoint's",
        default=None,
    )
    kv: str | None = given(
        "--kv P[,GPU=P...]: Precision of the KV cache, in general and per GPU type: bf16 or fp8.",
        panel="Inputs",
        shown="the checkpoint's",
        default=None,
    )
    mtp: str | None = given(
        "--mtp K:RATE: "
        "Multi-token prediction by layers of the model: K drafts per step and their acceptance rate, such as 1:0.85.",
        panel="Inputs",
        shown="no drafts",
        default=None,
    )
    profiles: Sequence[Path] = given(
        "--profile FILE: Profile of a GPU type; repeatable. Other types use their shipped profile, or are modelled.",
        panel="Inputs",
        default=(),
    )
    objective: Goal = given(
        f"--objective GOAL: Objective of the plan: {', '.join(ObjectiveKind)}.", panel="Goal", default="goodput"
    )
    rate: float | None = given(
        "--rate R: Demanded requests/s; required by the objectives cost and gpus. Others show whether it is met.",
        panel="Goal",
        default=None,
    )
    ttft: Quantity | None = given(  # None: no limit
        "--ttft TIME|none: Limit of the p95 time to first token.",
        panel="Goal",
        shown="2s; throughput: none",
        default="default",
    )
    tpot: Quantity | None = given(
        "--tpot TIME|none: Limit of the mean time per output token.",
        panel="Goal",
        shown="100ms; throughput: none",
        default="default",
    )
    ttft_statistic: StatisticName | None = given(
        "--ttft-statistic: Statistic of TTFT that must keep its limit in simulation.",
        panel="Goal",
        shown=DEFAULT.ttft,
        default=None,
    )
    tpot_statistic: StatisticName | None = given(
        "--tpot-statistic: Statistic of TPOT that must keep its limit in simulation.",
        panel="Goal",
        shown=DEFAULT.tpot,
        default=None,
    )
    attainment: Quantity | None = given(
        "--attainment SHARE: "
        "Share of simulated requests that must keep all limits (SLO attainment), instead of statistics; such as 90%.",
        panel="Goal",
        default=None,
    )
    pin: Sequence[str] = given(
        "--pin CONSTRAINT: "
        "node=|type=|zone= and :use=N (at least N GPUs in use) or :as=worker, primary, prefill, decode, unified "
        "(nothing else); replicas=N or N..M; usd=..N per hour; gpus=..N. Repeatable.",
        panel="Goal",
        default=(),
    )
    forbid: Sequence[str] = given(
        "--forbid CONSTRAINT: "
        "gpu=NODE/INDEX, node=, type=, zone= (not used, or not :as=worker, ...); tp=N; workers; shared-experts. "
        "Repeatable.",
        panel="Goal",
        default=(),
    )
    price_pins: bool = given(
        "--price-pins: Solve again without each --pin and --forbid to show what the objective would gain.",
        panel="Goal",
        default=False,
    )
    survive: Loss | Literal[""] = given(
        "--survive: "
        "Serve most after losing any one node or zone or, with --objective cost or gpus, still serve --rate.",
        panel="Goal",
        default="",
    )
    keep: Quantity | None = given(
        "--keep SHARE: With --survive: serve most of all plans of which at least this share is left.",
        panel="Goal",
        default=None,
    )
    rung: RungName | Literal[""] = given(
        "--rung NAME: "
        "The most complex replicas: node (each in one node), pipelines (over several), apart (prefill and decode), or "
        "workers (for attention).",
        panel="Search",
        shown="the highest that is worth it",
        default="",
    )
    worth: Quantity = given(
        "--worth SHARE: "
        "What a higher rung must gain to be the default: more requests/s, or the demand for less, also under the "
        "profiles' errors, with no less left without the worst node.",
        panel="Search",
        default="10%",
    )
    target: Target | Literal[""] = given(
        "--for TARGET: Only plans that this export target carries wholly.",
        panel="Search",
        shown="any target",
        default="",
    )
    strategy: StrategyName = given(
        "--strategy NAME: Family of plans to search, a name of `catalog strategies`.",
        panel="Search",
        default=DEFAULT_STRATEGY,
    )
    roles: Sequence[RoleName] = given(
        "--roles ROLE,...: Roles that replicas may have: unified, or prefill,decode, or all three.",
        panel="Search",
        shown="all that the strategy has",
        default=(),
    )
    engine: EngineName | None = given(
        "--engine NAME: Plan only what this engine can run: vllm-hetis (with attention workers), vllm or sglang.",
        panel="Search",
        shown="vllm-hetis; none for published heuristics",
        default=None,
    )
    max_stages: int | None = given(
        "--max-stages N: Maximum stages of a replica, in plans for an engine.",
        panel="Search",
        shown="8; fewer where kinds of GPUs are many",
        default=None,
    )
    max_gpus: int | None = given(
        "--max-gpus N: Maximum GPUs of a replica including attention workers, in plans for an engine.",
        panel="Search",
        default=None,
    )
    min_layers: int | None = given(
        "--min-layers-per-stage N: Minimum layers of a stage, in plans for an engine.",
        panel="Search",
        shown="4 of each of several stages, unless nothing else fits",
        default=None,
    )
    max_nodes: int | None = given(
        "--max-nodes-per-replica N: Maximum nodes of a replica including attention workers, in plans for an engine.",
        panel="Search",
        default=None,
    )
    max_num_seqs: int | None = given(
        "--max-num-seqs N: Maximum requests that an engine runs at once (a replica, or each copy that shares experts).",
        panel="Search",
        default=None,
    )
    chunk_tokens: Sequence[int] = given(
        "--chunk-tokens N[,N...]: Prompt tokens per iteration: vLLM's --max-num-batched-tokens less what decodes.",
        panel="Search",
        shown="256,512,2048",
        default=(),
    )
    kv_blocks: int | None = given(
        "--kv-blocks N: "
        "Maximum KV blocks of 16 tokens of an engine (of each copy that shares experts), as --num-gpu-blocks-override.",
        panel="Search",
        shown="what memory allows",
        default=None,
    )
    min_context: int | None = given(
        "--min-context N: Tokens of the longest request for which every replica has room, such as 32k.",
        panel="Search",
        shown="as it comes",
        default=None,
    )
    gpu_memory_utilization: Quantity | None = given(
        "--gpu-memory-utilization SHARE: Share of the GPUs' memory that engines take.",
        panel="Search",
        shown="the engine's: 0.92 of vLLM",
        default=None,
    )
    simplest_within: Quantity = given(
        "--simplest-within SHARE: "
        "Loss against the best plan, such as 10%, to accept for the simplest plan: least lost with a node, few shapes.",
        panel="Search",
        default="0",
    )
    time_limit: Quantity | None = given(
        "--time-limit TIME: Return the best plan found by then.",
        panel="Search",
        shown=f"{DEFAULT_TIME_LIMIT_S:g}s",
        default=None,
    )
    gap: Quantity = given(
        "--gap GAP: Stop when the plan is proven this close to the best; 0.5% or 0.005.", panel="Search", default="0.1%"
    )
    seed: int = given("--seed N: Random seed; the same seed gives the same plan.", panel="Search", default=0)
    profile_error: Quantity | None = given(
        "--profile-error ERROR: Also show how the plan fares when every profile coefficient is off by up to "
        "this: 20% or 0.2.",
        panel="Search",
        default=None,
    )
    verify: bool = given(
        "--verify/--no-verify: Simulate the plan at its planned rate and report whether the limits are kept.",
        panel="Result",
        default=True,
    )
    other_engines: bool = given(
        "--other-engines/--no-other-engines: "
        "Show what plans for other engines reach, found in a tenth of the time limit.",
        panel="Result",
        default=True,
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
