"""Plans for a model on a fleet, as made by ``hetis-plan place``, and documents from files."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Annotated, TypeVar

from hetis.formats import documents
from hetis.formats.model import drafts
from hetis.formats.traces import PrefixHitRate
from hetis.planner.jobs.kernels import compile_kernels
from hetis.planner.library import arguments
from hetis.planner.library.arguments import Path, Quantity, checked, one_of, read_by, spelled_as_arguments
from hetis.planner.library.plan import Plan
from hetis.planner.use_cases import place as placing
from hetis.planner.use_cases.service_level import Statistic, asked_level
from hetis.planner.use_cases.sources import engine_rules, engine_settings, load_plan_and_problem, ordered
from hetis.solver.budget import Progress, silent
from hetis.solver.cluster import Cluster
from hetis.solver.plan import DEFAULT_STRATEGY, DEFAULT_TIME_LIMIT_S, ObjectiveKind, Role

T = TypeVar("T")


def _strategies() -> Iterable[str]:
    from hetis.solver.placement.families import STRATEGIES

    return STRATEGIES


Drafts = Annotated[str, read_by(drafts)]
Objective = Annotated[str, one_of(lambda: ObjectiveKind, "objective")]
Strategy = Annotated[str, one_of(_strategies, "strategy")]
Roles = Annotated[Sequence[Annotated[str, one_of(lambda: Role, "role")]], arguments.LISTED]
Loss = Annotated[str, one_of(lambda: ("", *placing.PLACES), "loss")]


@checked
@spelled_as_arguments
def place(
    cluster: arguments.ClusterOrFile,
    model: arguments.ModelOrName,
    workload: arguments.WorkloadOrName,
    *,
    prefix_hit_rate: arguments.HitRate | None = None,
    objective: Objective = "goodput",
    rate: arguments.Demand | None = None,
    ttft: arguments.TtftLimit | None = "default",
    tpot: arguments.TpotLimit | None = "default",
    weights: str | None = None,
    kv: str | None = None,
    mtp: Drafts | None = None,
    pin: arguments.Texts = (),
    forbid: arguments.Texts = (),
    strategy: Strategy = DEFAULT_STRATEGY,
    roles: Roles = (),
    engine: str | None = None,
    max_stages: arguments.Count | None = None,
    max_gpus: arguments.Count | None = None,
    min_layers: arguments.Count | None = None,
    max_nodes: arguments.Count | None = None,
    max_num_seqs: arguments.Count | None = None,
    chunk_tokens: Sequence[arguments.Count] = (),
    kv_blocks: arguments.Count | None = None,
    min_context: arguments.Count | None = None,
    gpu_memory_utilization: arguments.Share | None = None,
    profiles: arguments.Files = (),
    simplest_within: arguments.BelowOne = 0.0,
    survive: Loss = "",
    time_limit: arguments.Duration | None = None,
    gap: arguments.BelowOne = 0.001,
    seed: arguments.CountOrZero = 0,
    threads: arguments.CountOrZero = 1,
    verify: bool = True,
    ttft_statistic: arguments.StatisticName | None = None,
    tpot_statistic: arguments.StatisticName | None = None,
    attainment: arguments.Share | None = None,
    other_engines: bool = True,
    progress: Callable[[Progress], None] = silent,
) -> Plan:
    """Decide which GPUs form which replicas, with a proof of optimality. Options are those of the command.

    Args:
        cluster: a Cluster file, or the result of `load_cluster`.
        model: a name of the catalogue, a ModelSpec file, a Hugging Face config.json, or a value.
        workload: a name of the catalogue, a Workload file, a trace, mean lengths such as ``8000/300``, or a value.
        prefix_hit_rate: share of prompt tokens that prefix caches have, such as 0.4, ``"40%"``, or ``"trace"``, counted
            by the hash ids of a trace; None: the workload's own.
        objective: ``goodput``, ``throughput``, ``cost`` or ``gpus``; the last two need ``rate`` in requests/s.
        ttft, tpot: limits in seconds or as ``"200ms"``; None means no limit, ``"default"`` is 2 s and 100 ms.
        weights: precision of the weights, ``bf16``, ``fp8``, ``int8``, ``awq-int4``, ``gptq-int4``, ``mxfp4`` or
            ``nvfp4``; ``"fp8,V100=bf16"`` gives GPU types their own; None: the checkpoint's.
        kv: precision of the KV cache, likewise: ``bf16`` or ``fp8``.
        mtp: drafted tokens and the rate at which each is accepted, ``"1:0.85"``; None: as the model's file says.
        engine: ``vllm-hetis`` (the default, except for published heuristics), ``vllm``, ``sglang`` or ``any``: plan
            only what it runs, replicas of at most ``max_stages`` and ``max_gpus``, each stage of ``min_layers`` or
            more, on at most ``max_nodes``.
        max_num_seqs, chunk_tokens, kv_blocks: settings that engines are started with, which plans keep to: requests
            that a replica runs at once, sizes of prefill chunks, and KV blocks of 16 tokens that it has at most.
        min_context: tokens of the longest request for which every replica must have room.
        gpu_memory_utilization: share of the GPUs' memory that engines take; None: the engine's default.
        simplest_within: share of the optimum that may be lost for replicas on fewer nodes, then of fewer shapes.
        survive: ``node`` or ``zone``: serve ``rate`` when any one of them is lost, with objective ``cost`` or ``gpus``.
        pin, forbid: constraints on the plan, such as ``"type=L4:as=worker"``; one, or several.
        time_limit: of the search, in seconds or as ``"30s"``; simulations and the searches that follow them may take as
            long again, at least 30 s. None: 60 s for the search, and as long as the simulations need.
        verify: simulate the plan at its promised rate; where it misses a limit, plan again for a tighter one.
        ttft_statistic, tpot_statistic: what of TTFT and TPOT the simulation holds to its limit: ``mean``, ``p50``,
            ``p90``, ``p95`` or ``p99``; None: p95 and mean.
        attainment: instead of statistics, the share of requests that have to keep all limits, such as ``"90%"``.
        other_engines: report the values of plans for other engines, found in a tenth of the time limit.
        progress: called with progress of the search, from this thread.

    Raises:
        InfeasibleError: no plan exists; contains the reasons.
        NoPlanFoundError: none was found within the time limit.
        HetisError: arguments are wrong, or an input is not usable; the message names them.
    """
    limit_s = None if time_limit is None else float(time_limit)
    goal = placing.objective(ObjectiveKind(objective), ttft_s=_limit(ttft), tpot_s=_limit(tpot), demand_rps=rate)
    request = placing.PlacementRequest(
        cluster=_text_or_value(cluster),
        model=_text_or_value(model),
        workload=_text_or_value(workload),
        prefix_hit_rate=_hit_rate(prefix_hit_rate),
        profiles=[os.fspath(path) for path in profiles],
        pins=pin,
        forbids=forbid,
        weights=weights,
        kv=kv,
        mtp=mtp,
        objective=goal,
        settings=placing.PlacementSettings(
            strategy=strategy,
            roles=ordered(map(Role, roles)),
            engine=engine_rules(
                engine, strategy, max_stages=max_stages, max_gpus=max_gpus, min_layers=min_layers, max_nodes=max_nodes
            ),
            keep_stages=max_stages is not None,
            time_limit_s=DEFAULT_TIME_LIMIT_S if limit_s is None else limit_s,
            gap_target=float(gap),
            seed=seed,
            threads=threads,
            simplest_within=float(simplest_within),
            survive=survive,
        ),
        engine_settings=engine_settings(
            max_num_seqs=max_num_seqs,
            chunk_tokens=chunk_tokens,
            kv_blocks=kv_blocks,
            min_context=min_context,
            gpu_memory_utilization=None if gpu_memory_utilization is None else float(gpu_memory_utilization),
        ),
        verify=verify,
        simulation_limit_s=placing.time_to_simulate_s(limit_s),
        service_level=asked_level(
            ttft=None if ttft_statistic is None else Statistic(ttft_statistic),
            tpot=None if tpot_statistic is None else Statistic(tpot_statistic),
            attainment=None if attainment is None else float(attainment),
            objective=goal,
            verify=verify,
        ),
        other_engines=other_engines,
    )
    loaded = placing.load(request)
    problem = placing.pose(request, loaded)
    compile_kernels(
        problem.cluster.num_gpus(), (strategy,), for_engine=request.settings.engine is not None, report=progress
    )
    plan = placing.place(request, loaded, problem, cancelled=threading.Event(), report=progress).plan
    return Plan(value=plan, problem=replace(problem, objective=plan.objective))  # larger if a loss is survived


def _text_or_value(given: T | Path) -> T | str:
    return os.fspath(given) if isinstance(given, str | os.PathLike) else given


def _hit_rate(given: Quantity | None) -> PrefixHitRate | None:
    return given if given is None else "trace" if given == "trace" else float(given)


def _limit(given: Quantity | None) -> float | None:
    """Return a latency limit in seconds: infinity if there is none, and None for the objective's default."""
    return None if given == "default" else float("inf" if given in (None, "none") else given)


@checked
def load_cluster(path: arguments.File) -> Cluster:
    """Read a Cluster file.

    Raises:
        HetisError: with every problem of the file, each with its line.
    """
    return documents.load_cluster(os.fspath(path))


@checked
def load_plan(path: arguments.File) -> Plan:
    """Read a plan that `Plan.save` or ``hetis-plan place --out`` wrote; it contains its inputs.

    A plan whose inputs were altered since gives a UserWarning.

    Raises:
        HetisError: the plan, or a document in it, is not usable.
    """
    found = load_plan_and_problem(os.fspath(path))
    for warning in found.warnings:
        warnings.warn(f"{os.fspath(path)}: {warning}", stacklevel=3)
    return Plan(value=found.plan, problem=found.problem)
