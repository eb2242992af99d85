"""Options of `hetis-plan`: how they are declared, and the ones that several verbs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hetis.commands import groups
from hetis.commands import verb as command_line
from hetis.commands.groups import group as group
from hetis.commands.verb import verb as verb
from hetis.planner.cli import values
from hetis.planner.use_cases.service_level import DEFAULT, ServiceLevel, Statistic, asked_level
from hetis.solver.plan import DEFAULT_STRATEGY, DEFAULT_TIME_LIMIT_S, ObjectiveKind, Role

if TYPE_CHECKING:
    from hetis.planner.use_cases.place import PlacementRequest, PlacementSettings
    from hetis.solver.plan import Objective
    from hetis.solver.problem import EngineRules, EngineSettings

# Parsers by the form of a value.
_PARSERS: Mapping[str | None, Callable[[str], Any]] = {
    "BANDWIDTH": values.bandwidth,
    "SHARE": values.share,
    "SHARE|trace": values.prefix_hit_rate,
    "TIME": values.positive_duration,
}

PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file, or - for standard input.")]


def option(usage: str, default: Any = None, **more: Any) -> Any:
    """Declare a field of a group as an option, as `groups.option`; the form of its value says how it is read."""
    return groups.option(usage, default, **({"parser": _PARSERS.get(groups.form_of(usage))} | more))


def panel(name: str) -> Callable[..., Any]:
    """Return `option` for one panel of the help."""
    return partial(option, panel=name)


# --- options of several verbs, each of which has its own group

_input, _goal, _search, _result = map(panel, ("Inputs", "Goal", "Search", "Result"))
_to_solve, _plan = panel("To solve"), panel("Plan")
_setting = partial(_search, parser=values.setting)  # one setting for every engine

cluster_option = partial(_input, "--cluster -c FILE: The fleet.", ...)
profile_option = partial(
    _input, "--profile FILE: Profile of a GPU type; repeatable. Other types use their shipped profile, or are modelled."
)
prefix_hit_rate_option = partial(
    _input,
    "--prefix-hit-rate SHARE|trace: "
    "Share of prompt tokens that prefix caches hold: 0.4, 40%, or trace to count it by a Mooncake trace's hash ids.",
    shown="the workload's, or 0",
)
rate_option = partial(
    _goal,
    "--rate R: Demanded requests/s; required by the objectives cost and gpus. Others show whether it is met.",
    parser=values.demand,
)
ttft_option = partial(_goal, "--ttft TIME|none: Limit of the p95 time to first token.", parser=values.ttft_limit)
tpot_option = partial(_goal, "--tpot TIME|none: Limit of the mean time per output token.", parser=values.tpot_limit)
ttft_statistic_option = partial(
    _goal, "--ttft-statistic: Statistic of TTFT that must keep its limit in simulation.", shown=DEFAULT.ttft
)
tpot_statistic_option = partial(
    _goal, "--tpot-statistic: Statistic of TPOT that must keep its limit in simulation.", shown=DEFAULT.tpot
)
attainment_option = partial(
    _goal,
    "--attainment SHARE: "
    "Share of simulated requests that must keep all limits (SLO attainment), instead of statistics; such as 90%.",
)
strategy_option = partial(
    _search,
    "--strategy NAME: Family of plans to search, a name of `catalog strategies`.",
    DEFAULT_STRATEGY,
    parser=values.strategy,
    autocompletion=values.strategy_names,
)
time_limit_option = partial(_search, "--time-limit TIME: Return the best plan found by then.")
gap_option = partial(
    _search, "--gap GAP: Stop when the plan is proven this close to the best; 0.5% or 0.005.", parser=values.gap
)
seed_option = partial(_search, "--seed N: Random seed; the same seed gives the same plan.", 0, min=0)
threads_option = partial(_search, "--threads N: Solver threads; 0 uses every core.", 1, min=0)
out_option = partial(
    _result,
    "--out FILE: Also save the plan; .yaml or .yml for YAML, anything else is JSON; - prints it instead of the tables.",
)
html_option = partial(_result, "--html FILE: Also save a self-contained HTML page; see `report`.")
dry_run_option = partial(
    _search,
    "--dry-run: "
    "Check every file, name and option and whether the results can be written, show what would be solved, and stop.",
    False,
)

no_wait_option = partial(option, "--no-wait: Return at once; `watch` shows the progress.", False)
check_only_option = partial(option, "--dry-run: Check and show everything without changing anything.", False)


# --- groups of several verbs


@group
class OptionalInputOptions:
    """The problem of ``apply``, a verb that need not solve one."""

    cluster: str | None = _to_solve(
        "--cluster -c FILE|NAME: The fleet: a file, which is applied first, or an existing cluster."
    )
    model: str | None = _to_solve("--model -m NAME|FILE: As for `place`.")
    workload: str | None = _to_solve("--workload -w NAME|FILE|P/O: As for `place`.")
    prefix_hit_rate: Any = prefix_hit_rate_option()  # a share or "trace", which typer's types cannot express
    weights: str | None = _input(
        "--weights P[,GPU=P...]: "
        "Precision of the weights, in general and per GPU type: bf16, fp8, int8, int4, awq-int4, gptq-int4, "
        "mxfp4, nvfp4, bnb-int4, bnb-int8, fbgemm-fp8.",
        parser=values.weights,
        autocompletion=values.weights_names,
        shown="the checkpoint's",
    )
    kv: str | None = _input(
        "--kv P[,GPU=P...]: Precision of the KV cache, in general and per GPU type: bf16 or fp8.",
        parser=values.kv,
        autocompletion=values.kv_names,
        shown="the checkpoint's",
    )
    mtp: str | None = _input(
        "--mtp K:RATE: "
        "Multi-token prediction by layers of the model: K drafts per step and their acceptance rate, such as 1:0.85.",
        parser=values.mtp,
        shown="no drafts",
    )
    profile: list[str] | None = _to_solve(
        "--profile FILE|NAME: Profile to use: a file, which is applied first, or an existing profile; repeatable."
    )


@group
class ApplyOptions:
    plan: str | None = _plan("--plan FILE: Import a Plan file instead.")
    name: str = _plan("--name ID: Name of the new plan.", "", shown="chosen by the planner")
    activate: bool = _plan("--activate: Put the plan in force and wait until it is.", False)
    out: Path | None = _plan("--out FILE: Save the Plan as JSON; - prints it instead of the tables.")
    rename: bool = option("--rename: Replace a cluster of another name that has the same id.", False)
    no_wait: bool = no_wait_option()
    dry_run: bool = check_only_option()


@group
class InputOptions(OptionalInputOptions):
    cluster: str = cluster_option()
    model: str = _input(
        "--model -m NAME|FILE: A name of `catalog models`, a ModelSpec file, or a Hugging Face config.json.",
        ...,
        autocompletion=values.model_names,
    )
    workload: str = _input(
        "--workload -w NAME|FILE|P/O: "
        "A name of `catalog workloads`, a Workload file, a trace, or mean lengths such as 8000/300.",
        ...,
        autocompletion=values.workload_names,
    )
    profile: list[str] | None = profile_option()

    def request(
        self, goal: GoalOptions, replicas: ReplicaOptions, constraints: ConstraintOptions | None = None, **more: Any
    ) -> PlacementRequest:
        """Return the request that these options make; ``more`` are its other fields."""
        from hetis.planner.use_cases.json_values import fields_of
        from hetis.planner.use_cases.place import PlacementRequest, objective

        constraints = constraints or ConstraintOptions()
        return PlacementRequest(
            **fields_of(self, "cluster", "model", "workload", "prefix_hit_rate", "weights", "kv", "mtp"),
            profiles=self.profile or (),
            pins=constraints.pin or (),
            forbids=constraints.forbid or (),
            objective=objective(goal.objective, ttft_s=goal.ttft, tpot_s=goal.tpot, demand_rps=goal.rate),
            engine_settings=replicas.engine_settings,
            **more,
        )


@group
class GoalOptions:
    objective: ObjectiveKind = _goal(
        f"--objective GOAL: Objective of the plan: {', '.join(ObjectiveKind)}.", ObjectiveKind.GOODPUT
    )
    rate: float | None = rate_option()
    ttft: float | None = ttft_option(shown="2s; throughput: none")
    tpot: float | None = tpot_option(shown="100ms; throughput: none")


@group
class ConstraintOptions:
    pin: list[str] | None = _goal(
        "--pin CONSTRAINT: "
        "node=|type=|zone= and :use=N (at least N GPUs in use) or :as=worker, primary, prefill, decode, unified "
        "(nothing else); replicas=N or N..M; usd=..N per hour; gpus=..N. Repeatable.",
        autocompletion=values.pinned_things,
    )
    forbid: list[str] | None = _goal(
        "--forbid CONSTRAINT: "
        "gpu=NODE/INDEX, node=, type=, zone= (not used, or not :as=worker, ...); tp=N; workers; shared-experts. "
        "Repeatable.",
        autocompletion=values.forbidden_things,
    )


@group
class FamilyOptions:
    strategy: str = strategy_option()
    roles: frozenset[Role] | None = _search(
        "--roles ROLE,...: Roles that replicas may have: unified, or prefill,decode, or all three.",
        parser=values.roles,
        autocompletion=values.role_names,
        shown="all that the strategy has",
    )
    engine: str | None = _search(
        "--engine NAME: Plan only what this engine can run: vllm-hetis (with attention workers), vllm, sglang, or any.",
        parser=values.engine,
        autocompletion=values.engine_names,
        shown="vllm-hetis; any for published heuristics",
    )


@group
class ReplicaOptions:
    """Limits of every replica, and the settings with which its engine is started."""

    max_stages: int | None = _search(
        "--max-stages N: Maximum stages of a replica, in plans for an engine.",
        min=1,
        max=16,
        shown="8; fewer where kinds of GPUs are many",
    )
    max_gpus: int | None = _search(
        "--max-gpus N: Maximum GPUs of a replica including attention workers, in plans for an engine.", min=1
    )
    min_layers: int | None = _search(
        "--min-layers-per-stage N: Minimum layers of a stage, in plans for an engine.", min=1
    )
    max_nodes: int | None = _search(
        "--max-nodes-per-replica N: Maximum nodes of a replica including attention workers, in plans for an engine.",
        min=1,
    )
    max_num_seqs: int | None = _setting(
        "--max-num-seqs N: Maximum requests that an engine runs at once (a replica, or each copy that shares experts)."
    )
    chunk_tokens: frozenset[int] | None = _search(
        "--chunk-tokens N[,N...]: Prompt tokens per iteration: vLLM's --max-num-batched-tokens less what decodes.",
        parser=values.chunks,
        shown="256,512,2048",
    )
    kv_blocks: int | None = _setting(
        "--kv-blocks N: "
        "Maximum KV blocks of 16 tokens of an engine (of each copy that shares experts), as --num-gpu-blocks-override.",
        shown="what memory allows",
    )
    min_context: int | None = _search(
        "--min-context N: Tokens of the longest request for which every replica has room, such as 32k.",
        parser=values.tokens,
        shown="as it comes",
    )
    gpu_memory_utilization: float | None = _search(
        "--gpu-memory-utilization SHARE: Share of the GPUs' memory that engines take.",
        parser=values.share,
        shown="the engine's: 0.92 of vLLM",
    )

    @property
    def limits(self) -> dict[str, int | None]:
        from hetis.planner.use_cases.json_values import fields_of
        from hetis.planner.use_cases.sources import LIMITS

        return fields_of(self, *LIMITS)

    @property
    def engine_settings(self) -> EngineSettings:
        from hetis.planner.use_cases.sources import engine_settings

        return engine_settings(
            max_num_seqs=self.max_num_seqs, chunk_tokens=self.chunk_tokens or (), kv_blocks=self.kv_blocks,
            min_context=self.min_context, gpu_memory_utilization=self.gpu_memory_utilization,
        )  # fmt: skip


@group
class ServiceLevelOptions:
    """The part of the simulated traffic that has to keep the latency limits."""

    ttft_statistic: Statistic | None = ttft_statistic_option()
    tpot_statistic: Statistic | None = tpot_statistic_option()
    attainment: float | None = attainment_option()

    def level(self, objective: Objective, *, verify: bool) -> ServiceLevel:
        """Return the level. Raises InvalidProblemError if the options contradict each other."""
        return asked_level(
            ttft=self.ttft_statistic, tpot=self.tpot_statistic, attainment=self.attainment, objective=objective,
            verify=verify,
        )  # fmt: skip


@group
class SearchOptions:
    time_limit: float | None = time_limit_option(shown=f"{DEFAULT_TIME_LIMIT_S:g}s")  # None: none was given
    gap: float = gap_option("0.1%")
    seed: int = seed_option()
    threads: int = threads_option()

    @property
    def time_limit_s(self) -> float:
        """Return the time limit of a search: the given one, or else the default."""
        return DEFAULT_TIME_LIMIT_S if self.time_limit is None else self.time_limit

    def settings(self, family: FamilyOptions, replicas: ReplicaOptions, **more: Any) -> PlacementSettings:
        from hetis.planner.use_cases.sources import ordered

        return self.settings_of(
            strategy=family.strategy,
            roles=ordered(family.roles or ()),
            engine=engine_rules(family.engine, family.strategy, replicas.limits),
            keep_stages=replicas.max_stages is not None,
            **more,
        )

    def settings_of(self, **more: Any) -> PlacementSettings:
        from hetis.planner.use_cases.place import PlacementSettings

        return PlacementSettings(
            time_limit_s=self.time_limit_s, gap_target=self.gap, seed=self.seed, threads=self.threads, **more
        )


Survived = Literal["node", "zone"]  # the loss that the demand must survive

verify_option = partial(
    _result,
    "--verify/--no-verify: Simulate the plan at its planned rate and report whether the limits are kept.",
    True,
)
survive_option = partial(
    _goal,
    "--survive: Still serve --rate after losing any one node or zone; needs --objective cost or gpus. Several searches "
    "share the time limit.",
)


@group
class VerificationOptions:
    """The changes that the plan must survive, and whether its latency limits are tested in simulated traffic."""

    survive: Survived | None = survive_option()
    verify: bool = verify_option()


def refuse_without(needed: str, kind: Any, *names: str, is_given: bool) -> None:
    """Refuse options of a group, the fields of these names or all, that would be ignored without another one.

    Those with their defaults are not refused, nor those that a file of defaults or the environment sets. Raises
    typer.BadParameter.
    """
    for name, option in given_in(kind).items():
        is_default = getattr(kind, name) == getattr(type(kind), name)
        if not (is_given or is_default) and (name in names or not names):
            raise typer.BadParameter(f"{option} needs {needed}")


def spelled(name: str) -> str:
    """Return a field's option as users write it."""
    return f"--{name.replace('_', '-')}"


def given_in(*groups: Any) -> dict[str, str]:
    """Return the options of groups that have values from the command line, by their fields."""
    named = (one for kind in groups for one in fields(kind) if one.name in command_line.given.get())
    return {one.name: one.metadata["option"].default for one in named}  # typer takes the first name for the default


def engine_rules(name: str | None, strategy: str, limits: Mapping[str, int | None]) -> EngineRules | None:
    """Return the rules of ``--engine`` and the limits. None: any engine, the default for published heuristics."""
    from hetis.planner.use_cases.sources import engine_rules as rules_of
    from hetis.solver.errors import InvalidProblemError

    try:
        return rules_of(name, strategy, **limits)
    except InvalidProblemError as error:
        raise typer.BadParameter(str(error)) from None
