"""Plans against MLPerf Inference v5.1: the output tokens/s planned for a fleet, and those published.

    python -m benchmarks.accuracy.mlperf [--points FILE] [--json] [--only TEXT] [--quick] [--markdown]
                                        [--simulated]

Every row of the table (`benchmarks.accuracy.mlperf_rows`) is a submission. Submissions on equal nodes with one model,
weight format, scenario and engine form one group, for which one node is planned: the planner chooses replicas, stages,
batches and chunks for the highest rate, or in Server and Interactive for the goodput under MLPerf's limits, by p95 TTFT
and mean TPOT. With ``--simulated`` the rate is what simulated traffic keeps by MLPerf's rule, p99 of TTFT and of each
request's TPOT. Profiles are the shipped ones or, for GPUs without measurements, modelled ones, with the engine's host
times. Nothing is fitted to these rows.

A row is one group, with rates in output tokens/s per GPU: ``predicted`` by the plan, ``best`` and ``median`` of its
``n`` submissions, and the prediction over each. ``plan`` describes its replicas, ``in_range`` says whether the best
submission lies in the range that the plan states by the errors of its profiles. The last rows are totals: the mean
absolute error (``mape``) and the mean (``bias``, negative: predicted too slow) of predicted / best - 1, how many
groups are in range, and how many rows were posed and skipped. ``--markdown`` writes docs/accuracy.md.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from benchmarks.accuracy import published_points
from benchmarks.accuracy.mlperf_rows import (
    BENCHMARKS,
    COLUMNS,
    SCENARIOS,
    Submission,
    System,
    pose,
)
from benchmarks.accuracy.published_points import FOLDER, NotPosedError
from benchmarks.measuring import rows
from benchmarks.measuring.instances import fleet
from benchmarks.measuring.rows import Cell, Row
from hetis.formats import catalogue
from hetis.formats.documents import load_model
from hetis.formats.models import dtypes
from hetis.planner.use_cases.record.forms import Range
from hetis.planner.use_cases.record.parts import Requested
from hetis.planner.use_cases.robustness import profile_errors
from hetis.planner.use_cases.service_level import ServiceLevel, Statistic
from hetis.planner.use_cases.sources import family_of
from hetis.planner.use_cases.verification.rates import kept_plan
from hetis.profiler.defaults import shipped_profile
from hetis.profiler.engines import for_engine
from hetis.profiler.roofline import modelled_profile
from hetis.solver.budget import Budget
from hetis.solver.engine_rules import EngineRules, EngineSettings
from hetis.solver.errors import HetisError
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op
from tools import tables

POINTS = FOLDER / "mlperf_v5_1.csv.gz"
CHUNKS = (256, 512, 1024, 2048, 4096, 8192)  # submitters set the tokens of an iteration to 256 to 65,536
TIME_LIMIT_S = 60.0  # CPU seconds, so that other work on the machine does not cut searches short
QUICK_STRIDE = 12
RULE = ServiceLevel(ttft=Statistic.P99, tpot=Statistic.P99)
# The GPU has a shipped profile, or a modelled one: with coefficients from kernels timed on it, or on other GPUs.
PROFILES = ("measured", "timed", "relatives")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A group of submissions and the plan for their node."""

    submissions: tuple[Submission, ...]
    plan: Plan
    rates: Range  # the plan's, in requests/s, by the errors of its profiles

    @property
    def system(self) -> System:
        return self.submissions[0].system

    @property
    def predicted(self) -> float:
        """Return the output tokens/s per GPU that the plan promises."""
        return self.plan.result.value * self._tokens_of_gpu

    @property
    def in_range(self) -> bool:
        """Return whether the best submission lies in the range that the plan states."""
        return self.rates.low * self._tokens_of_gpu <= self.best <= self.rates.high * self._tokens_of_gpu

    @property
    def _tokens_of_gpu(self) -> float:
        """Return the output tokens per GPU of a request to the node."""
        return output_tokens(self.submissions) / self.system.gpus

    @property
    def best(self) -> float:
        return max(one.tokens_per_s for one in self.submissions)

    @property
    def profile(self) -> str:
        """Return where the times of the GPU's layers come from, one of `PROFILES`."""
        if shipped_profile(self.system.gpu) is not None:
            return "measured"
        modelled = modelled_profile(catalogue.find_gpu(self.system.gpu).gpu)
        errors = [fit.provenance for fit in modelled.fits if fit.op is Op.DECODE_ATTENTION]
        return "relatives" if all(each.range_error is not None for each in errors) else "timed"


def main() -> None:
    """Print a row per group, totals, and the numbers of posed and skipped rows."""
    parser = published_points.parser("benchmarks.accuracy.mlperf", __doc__, POINTS)
    parser.add_argument("--simulated", action="store_true", help="rates that simulation keeps by MLPerf's rule")
    arguments = parser.parse_args()
    table = published_points.asked_rows(arguments, COLUMNS)
    if table is None:
        return
    outcomes, skipped = predicted(table, quick=arguments.quick, only=arguments.only, simulates=arguments.simulated)
    groups, totals = list(group_rows(outcomes)), list(total_rows(outcomes))
    posed = sum(len(one.submissions) for one in outcomes)
    covered = list(published_points.coverage("posed", posed, skipped))
    if arguments.markdown:
        write_document(groups, totals, covered)
    if arguments.json:
        for row in (*groups, *totals, *covered):
            print(json.dumps(row), flush=True)
        return
    print(rows.table(groups), "", rows.table(totals), "", sep="\n")
    published_points.print_coverage(covered, "rows")


def predicted(
    table: list[dict[str, str]], *, quick: bool = False, only: str = "", simulates: bool = False
) -> tuple[list[Outcome], Counter[str]]:
    """Return the plans of all groups, and the number of rows without one by reason."""
    groups, skipped = grouped(table)
    chosen = [members for members in groups if only in members[0].system.name]
    found = list[Outcome]()
    for members in chosen[:: QUICK_STRIDE if quick else 1]:
        try:
            plan, rates = plan_of(members, simulates=simulates)
            found.append(Outcome(submissions=members, plan=plan, rates=rates))
        except HetisError as error:
            skipped[f"no plan: {error}"] += len(members)
    return found, skipped


def grouped(table: list[dict[str, str]]) -> tuple[list[tuple[Submission, ...]], Counter[str]]:
    """Return the posed submissions by system, sorted, and the number of other rows by reason.

    A run is reported under both accuracy targets of a model, and counts once.
    """
    groups, skipped = defaultdict[System, list[Submission]](list), Counter[str]()
    seen = set[tuple[str, ...]]()
    for row in table:
        try:
            posed = pose(row)
        except NotPosedError as error:
            skipped[str(error)] += 1
            continue
        if posed.run in seen:
            skipped["the same run under another accuracy target"] += 1
            continue
        seen.add(posed.run)
        groups[posed.system].append(posed)

    def order(system: System) -> tuple[object, ...]:
        return SCENARIOS.index(system.scenario), system.name, system.gpus

    return [tuple(groups[system]) for system in sorted(groups, key=order)], skipped


def output_tokens(submissions: Sequence[Submission]) -> float:
    """Return the mean output tokens per answer."""
    return fmean(one.output_tokens for one in submissions)


def plan_of(submissions: Sequence[Submission], *, simulates: bool = False) -> tuple[Plan, Range]:
    """Return the plan for one node of a group, and the range of its rate by the errors of its profiles.

    With ``simulates``, its rate is what simulated traffic keeps by `RULE`, unless it promises no latency.

    Raises:
        HetisError: no plan exists.
    """
    problem = problem_of(submissions[0].system, output_tokens(submissions))
    plan = solve_placement(problem, budget=Budget(time_limit_s=TIME_LIMIT_S, clock=time.process_time))
    if simulates:
        ruled = replace(Requested.of(plan), service_level=RULE).on(plan)
        plan = kept_plan(ruled, problem, seed=0, budget=Budget(), report=lambda *_: None)
    stated = profile_errors.predicted(plan, problem)
    assert stated is not None, "all profiles state errors"
    return plan, stated.rate


def problem_of(system: System, tokens: float) -> PlacementProblem:
    """Return the placement of a group's model on one of its nodes, for answers with this mean number of tokens.

    Plans follow the rules of vLLM for every engine: pipelines of whole replicas, which all of them run.
    """
    kind = catalogue.find_gpu(system.gpu).gpu
    model = dtypes.with_precision(load_model(BENCHMARKS[system.benchmark].model), weights=system.weights, kv="fp8")
    # For MoE models, submitters distribute whole experts over ranks and combine that with attention data parallelism.
    profile = for_engine(
        shipped_profile(system.gpu) or modelled_profile(kind), kind, system.engine,
        stream_interval=system.stream_interval(tokens), whole_experts=model.experts is not None,
        default_backend=model.experts is None, schedules_ahead=system.schedules_ahead,
    )  # fmt: skip
    settings = EngineSettings(max_num_seqs=system.seats, chunk_tokens=CHUNKS)
    return PlacementProblem(
        cluster=fleet("node", (1, system.gpus, system.gpu)),
        model=model,
        workload=system.workload(tokens).clipped_to(model.max_position),
        profiles={system.gpu: profile},
        objective=system.objective,
        family=family_of("hetis", (Role.UNIFIED,), EngineRules(name="vllm"), settings),
    )


def group_rows(outcomes: Sequence[Outcome]) -> Iterator[Row]:
    """Yield a row per group."""
    for outcome in outcomes:
        system, rates = outcome.system, [one.tokens_per_s for one in outcome.submissions]
        yield {
            "scenario": system.scenario, "gpu": system.gpu, "gpus": system.gpus, "model": system.benchmark,
            "weights": system.weights, "engine": system.engine,
            "profile": outcome.profile, "n": len(rates),
            "predicted": _rate(outcome.predicted), "best": _rate(outcome.best), "median": _rate(median(rates)),
            "over_best": _round(outcome.predicted / outcome.best, 3),
            "over_median": _round(outcome.predicted / median(rates), 3),
            "in_range": "yes" if outcome.in_range else "no", "plan": shape_of(outcome.plan),
        }  # fmt: skip


def shape_of(plan: Plan) -> str:
    """Return the replicas of a plan in a few words, with equal ones merged."""
    shapes = Counter(map(_shape, plan.replicas))
    return ", ".join(f"{count} x {shape}" for shape, count in shapes.items())


def _shape(replica: ReplicaPlan) -> str:
    stages, role = replica.stages, "" if replica.role is Role.UNIFIED else f" {replica.role}"
    if replica.expert_parallel:
        return f"TP{stages[0].tp} x{stages[0].copies} EP{role}"
    return f"TP{stages[0].tp}" + (f" PP{len(stages)}" if len(stages) > 1 else "") + role


def total_rows(outcomes: Sequence[Outcome]) -> Iterator[Row]:
    """Yield the errors against the best submission of each group, by scenario and profile, and over all."""
    for scenario in SCENARIOS:
        of_scenario = [one for one in outcomes if one.system.scenario == scenario]
        for profile in (*PROFILES, "all"):
            chosen = [one for one in of_scenario if profile in (one.profile, "all")]
            errors = [one.predicted / one.best - 1.0 for one in chosen]
            if errors:
                yield {
                    "scenario": scenario, "profile": profile, "groups": len(errors),
                    "mape": _round(fmean(map(abs, errors)), 3), "bias": _round(fmean(errors), 3),
                    "within_30_percent": sum(abs(error) <= 0.3 for error in errors),
                    "in_range": sum(one.in_range for one in chosen),
                }  # fmt: skip


def write_document(groups: Sequence[Row], totals: Sequence[Row], covered: Sequence[Row]) -> None:
    """Write the tables of docs/accuracy.md."""
    headings = [key.replace("_", " ") for key in totals[0]]
    tables.write("mlperf totals", headings, (list(_shown(row).values()) for row in totals))
    published_points.write_skipped("mlperf", covered, "rows")
    rows.keep("mlperf", [_shown(row) for row in groups])


def _shown(row: Row) -> dict[str, Cell]:
    """Return a row with errors as percentages."""
    return {key: f"{v:+.1%}" if key == "bias" else f"{v:.1%}" if key == "mape" else v for key, v in row.items()}


def _rate(value: float) -> float:
    return round(value) if value >= 1000.0 else _round(value, 4)


def _round(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


if __name__ == "__main__":
    main()
