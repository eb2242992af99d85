"""Fair shares from a ShareProblem file; missing speed-ups are derived from our own placements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from hetis.formats import catalogue
from hetis.formats.documents import load_model, load_workload
from hetis.formats.errors import DocumentError, Problem
from hetis.formats.tenants import ShareInputs
from hetis.planner.use_cases.sources import attempt
from hetis.profiler.defaults import default_profile
from hetis.solver.budget import Budget
from hetis.solver.cluster import Cluster, GpuSlots, Link, Network, NodeGroup
from hetis.solver.errors import InfeasibleError, InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Objective, ObjectiveKind
from hetis.solver.problem import PlacementProblem
from hetis.solver.shares.problem import GpuShare, Job, Rule, ShareProblem, Shares, Tenant
from hetis.solver.shares.properties import Claim, Properties, Round, best_claim, next_round, properties_of
from hetis.solver.shares.solve import solve_shares
from hetis.solver.workload import Workload

NETWORK = Link(bytes_per_s=12.5e9, latency_s=20e-6)  # 100 Gbps between nodes, for deriving speed-ups
GAP = 0.005  # of the placements from which speed-ups are derived


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Shares under each requested rule, and their properties.

    Attributes:
        derived: jobs (``tenant/job``) whose speed-ups come from our placements.
        rounds: whole GPUs under the first rule, round by round.
        claims: the most profitable false claims under the first rule, per claimant: inflated, deflated.
    """

    problem: ShareProblem
    shares: tuple[Shares, ...]
    properties: tuple[Properties, ...]
    derived: tuple[str, ...]
    rounds: tuple[Round, ...]
    claims: tuple[tuple[Claim, Claim], ...]


def share_out(
    inputs: ShareInputs, rules: tuple[Rule, ...], *, budget: Budget, tell: Callable[[str], None], rounds: int = 0,
    claims: int = 0,
) -> Sharing:  # fmt: skip
    """Share the fleet under every rule and check the answers.

    For the first rule, also return ``rounds`` rounds of whole GPUs, and the best of ``claims`` false claims per
    claimant.

    Raises:
        DocumentError: a model, workload or GPU type from which speed-ups are derived is unknown.
        InvalidProblemError: a model runs on none of the GPU types.
    """
    problem, derived = share_problem(inputs, budget=budget, tell=tell)
    shares = tuple(solve_shares(problem, rule) for rule in rules)
    _require_checked(problem, shares)
    return Sharing(
        problem=problem,
        shares=shares,
        properties=tuple(properties_of(problem, answer.amounts) for answer in shares),
        derived=derived,
        rounds=_rounds(problem, shares[0], rounds),
        claims=_claims(problem, rules[0], claims, tell),
    )


def _rounds(problem: ShareProblem, shares: Shares, count: int) -> tuple[Round, ...]:
    found, owed = list[Round](), np.zeros_like(shares.amounts)
    for _ in range(count):
        found.append(next_round(problem, shares.amounts, owed))
        owed = found[-1].owed
    return tuple(found)


def _claims(
    problem: ShareProblem, rule: Rule, tries: int, tell: Callable[[str], None]
) -> tuple[tuple[Claim, Claim], ...]:
    if tries == 0:
        return ()
    tell(f"trying {tries} false claims of every job, up and down")
    return tuple(
        (
            best_claim(problem, rule, claimant, inflate=True, tries=tries),
            best_claim(problem, rule, claimant, inflate=False, tries=tries),
        )
        for claimant in range(len(problem.weights))
    )


def share_problem(
    inputs: ShareInputs, *, budget: Budget, tell: Callable[[str], None]
) -> tuple[ShareProblem, tuple[str, ...]]:
    """Return the problem of a file, and the names of the jobs whose speed-ups were derived."""
    work = _models_and_workloads(inputs)
    known: dict[tuple[str, str], Mapping[str, float]] = {}  # one derivation serves all jobs with the same work
    derived = []
    tenants = []
    for tenant in inputs.tenants:
        jobs = []
        for job in tenant.jobs:
            speedups = job.speedups
            if job.model is not None and job.workload is not None:
                name = f"{tenant.name}/{job.name}"
                pair = (job.model, job.workload)
                if pair not in known:
                    tell(f"speed-ups of {name} from placements on each GPU type")
                    known[pair] = _derived_speedups(inputs, *work[pair], budget=budget)
                speedups = known[pair]
                derived.append(name)
            assert speedups is not None, "a file gives speed-ups, or a model and its workload"
            jobs.append(
                Job(name=job.name, speedups=tuple(speedups[gpu] for gpu in inputs.gpus), min_gpus=job.min_gpus)
            )  # fmt: skip
        tenants.append(Tenant(name=tenant.name, weight=tenant.weight, jobs=tuple(jobs)))
    gpus = tuple(GpuShare(gpu=gpu, count=count) for gpu, count in inputs.gpus.items())
    return ShareProblem(gpus=gpus, tenants=tuple(tenants)), tuple(derived)


def _models_and_workloads(inputs: ShareInputs) -> Mapping[tuple[str, str], tuple[ModelSpec, Workload]]:
    """Return models and workloads for deriving speed-ups, by their names in the file; reports all errors at once."""
    problems: list[Problem] = []
    found = {}
    asked = dict.fromkeys(
        (job.model, job.workload)
        for tenant in inputs.tenants
        for job in tenant.jobs
        if job.model is not None and job.workload is not None
    )
    for model, workload in asked:
        spec = attempt(lambda name=model: load_model(name), problems)  # type: ignore[misc]
        traffic = attempt(lambda name=workload: load_workload(name), problems)  # type: ignore[misc]
        if spec is not None and traffic is not None:
            found[model, workload] = (spec, traffic)
    if asked:
        for gpu in inputs.gpus:
            try:
                catalogue.find_gpu(gpu)
            except catalogue.UnknownNameError as error:
                problems.append(Problem(file="gpus", message=f"{error}; speed-ups can be derived for known types only"))
    if problems:
        raise DocumentError(problems)
    return found


def _derived_speedups(
    inputs: ShareInputs, model: ModelSpec, workload: Workload, *, budget: Budget
) -> Mapping[str, float]:
    """Return the goodput per GPU of the best placement on all GPUs of each single type; 0 if the model does not fit."""
    from hetis.solver.planning import solve_placement

    rates = {}
    for name, count in inputs.gpus.items():
        try:
            fleet = _one_type(name, count, inputs.gpus_per_node, model, workload)
            plan = solve_placement(fleet, budget=budget, gap_target=GAP)
            rates[name] = plan.result.value / count
        except InfeasibleError:
            rates[name] = 0.0
    if not any(rates.values()):
        raise InvalidProblemError(
            f"{model.name} with {workload.name} can be served on none of {', '.join(rates)} alone"
        )
    return rates


def _one_type(name: str, count: int, per_node: int, model: ModelSpec, workload: Workload) -> PlacementProblem:
    gpu = catalogue.find_gpu(name).gpu
    size = min(count, per_node)
    groups = [NodeGroup(name="full", count=count // size, gpus=(GpuSlots(gpu=gpu.name, count=size),))]
    if count % size:
        groups.append(NodeGroup(name="rest", count=1, gpus=(GpuSlots(gpu=gpu.name, count=count % size),)))
    return PlacementProblem(
        cluster=Cluster(
            name=name, node_groups=tuple(groups), gpu_types={gpu.name: gpu}, network=Network(default=NETWORK)
        ),
        model=model,
        workload=workload.clipped_to(model.max_position),
        profiles={gpu.name: default_profile(gpu)[1]},
        objective=Objective(kind=ObjectiveKind.GOODPUT),
    )


def _require_checked(problem: ShareProblem, shares: tuple[Shares, ...]) -> None:
    """Raise `UncheckedPlanError` if the independent checker finds something wrong."""
    from hetis.planner.use_cases.errors import UncheckedPlanError
    from hetis.solver.shares.check import check_shares

    found = tuple(f"{answer.rule}: {sentence}" for answer in shares for sentence in check_shares(problem, answer))
    if found:
        raise UncheckedPlanError(found)
