"""Time and proven quality of placements, from 12 GPUs to a million; Llama-2-70B, azure_conv_2023.

    python -m benchmarks.placement [--quick] [--json] [--engine vllm]

Plans are for vLLM with the plugin, as in `hetis-plan place`, or for another engine.

Every row is a separate process. ``seconds`` is the first solve of that process, which loads compiled kernels from
numba's cache and binds the plan to named GPUs (rows called "warm": the median of the next five). ``first_plan_s`` and
``first_bound_s`` are the times of the first plan and the first bound on the whole family, ``to_1_percent_s`` and
``to_half_percent_s`` those at which the gap was proved to be that small, and ``gap`` is the final one. Large fleets
search until 0.1% or their time limit. All seconds, including limits, are CPU seconds of the process. Fleets with P100s
have a TTFT limit of 4 s, because no plan meets 2 s.

Bars: 12 GPUs optimal in 1 s (2 s without limits); 24 to 60 GPUs 0.5% in 5 s; 160 GPUs 0.5% in 5 s
(cost and GPUs: 1% in 10 s); 1,000 GPUs 0.5% in 8 s; 10,000 GPUs 0.5% in 10 s and 2 GiB; 1,000,000 GPUs 0.5% in 20 s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

from benchmarks.measuring import rows
from benchmarks.measuring.instances import (
    DEFAULT_LIMITS,
    NO_LIMITS,
    example,
    fleet,
    of_types,
    problem,
    scaled,
)
from benchmarks.measuring.rows import Row
from benchmarks.measuring.solving import Measured, Solve, failed, in_own_process, measure
from hetis.planner.use_cases.sources import named
from hetis.solver.cluster import Cluster
from hetis.solver.engine_rules import EngineRules
from hetis.solver.placement.families import DEFAULT_ENGINE, ENGINES, run_by
from hetis.solver.plan import Objective, ObjectiveKind
from hetis.solver.problem import PlacementProblem

BETWEEN = (
    ("20 GPUs, TTFT 4 s", (1, 4, "A100-PCIe-80GB"), (4, 2, "RTX-3090"), (2, 4, "P100-PCIe-12GB")),
    ("24 GPUs", (1, 8, "A100-SXM-80GB"), (4, 2, "RTX-3090"), (2, 4, "L4")),
    ("32 GPUs", (1, 8, "H100-SXM-80GB"), (1, 8, "A100-SXM-80GB"), (4, 4, "L4")),
    ("40 GPUs", (1, 8, "A100-SXM-80GB"), (4, 4, "L40S"), (4, 4, "T4")),
    ("60 GPUs", (1, 4, "H100-SXM-80GB"), (1, 8, "A100-SXM-80GB"), (4, 4, "A10G"), (4, 4, "L4"), (4, 4, "T4")),
)
SCALES = (1, 4, 16, 64, 256, 1024, 8192, 83333)
TYPE_COUNTS = range(1, 9)
GPUS_PER_TYPES_ROW = 1024
SLOWER = Objective(ttft_limit_s=4.0)  # limit for fleets with P100s, which have no plan under 2 s
THROUGHPUT = replace(NO_LIMITS, kind=ObjectiveKind.THROUGHPUT)
BETWEEN_LIMIT_S = 30.0
CURVE_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row to be measured: a problem and how to solve it."""

    name: str
    problem: PlacementProblem
    time_limit_s: float
    gap_target: float = 0.001
    warm: int = 0
    empty_cache: bool = False

    def measured(self) -> Measured:
        """Solve it in a new process."""
        solve = Solve(problem=self.problem, time_limit_s=self.time_limit_s, gap_target=self.gap_target, warm=self.warm)
        with tempfile.TemporaryDirectory() as folder:
            environment = {"NUMBA_CACHE_DIR": folder} if self.empty_cache else {}
            try:
                return in_own_process(measure, solve, environment=environment)
            except BrokenProcessPool:  # killed, most likely for lack of memory
                return failed("the process died")


def main() -> None:
    """Print all rows."""
    parser = rows.parser("benchmarks.placement", __doc__)
    parser.add_argument("--engine", choices=ENGINES, default=DEFAULT_ENGINE, help="whose plans are searched")
    arguments = parser.parse_args()
    benchmark = Benchmark(engine=arguments.engine, quick=arguments.quick, only=arguments.only)
    name = "placement" if arguments.engine == DEFAULT_ENGINE else f"placement_{arguments.engine}"
    shown = rows.show(benchmark.rows(), arguments, name=name)
    rows.exit_if_crashed(shown)


class Benchmark:
    """The rows of one engine, in the order of the documentation."""

    def __init__(self, *, engine: str, quick: bool, only: str) -> None:
        self.engine, self.quick, self.only = engine, quick, only

    def rows(self) -> Iterator[Row]:
        """Measure and yield the rows."""
        yield from self._smallest_rows()
        cases = [*self._between_cases(), *self._fleet_cases(), *([] if self.quick else self._curve_cases())]
        cases = [case for case in cases if self.only in case.name]
        for case in cases:
            yield _row(case, case.measured())

    def posed(self, cluster: Cluster, objective: Objective) -> PlacementProblem:
        """Return a fleet's problem for the engine."""
        found = problem(cluster, objective=objective)
        return replace(found, family=run_by(found.family, named(EngineRules(name=""), self.engine)))

    def _smallest_rows(self) -> Iterator[Row]:
        """Yield the rows of 12 GPUs: compiled for the first time, loaded from the cache, and warm."""
        for limits, objective in ((", TTFT 4 s", SLOWER), (", no limits", NO_LIMITS)):
            name = f"12 GPUs{limits}"
            posed = self.posed(example("paper"), objective)
            if objective is SLOWER and not self.quick and self.only in f"{name}, empty cache":
                case = Case(name=f"{name}, empty cache", problem=posed, time_limit_s=120.0, empty_cache=True)
                yield _row(case, case.measured())
            if self.only not in f"{name}, warm":
                continue
            if not self.quick:
                in_own_process(measure, Solve(problem=posed, time_limit_s=60.0))  # fills the cache
            case = Case(name=name, problem=posed, time_limit_s=60.0, warm=3 if self.quick else 5)
            measured = case.measured()
            yield _row(case, measured)
            yield _row(replace(case, name=f"{name}, warm"), measured)

    def _between_cases(self) -> Iterator[Case]:
        """Yield cases with few replicas, for which a gap may remain."""
        for name, *nodes in BETWEEN[1:2] if self.quick else BETWEEN:
            objective = SLOWER if any(gpu.startswith("P100") for _, _, gpu in nodes) else DEFAULT_LIMITS
            posed = self.posed(fleet(name, *nodes), objective)
            yield Case(name=name, problem=posed, time_limit_s=2.0 if self.quick else BETWEEN_LIMIT_S)

    def _fleet_cases(self) -> Iterator[Case]:
        """Yield fleets of every size, by objective; the demand is about what half of the GPUs serve."""
        _, *nodes = BETWEEN[1]
        fleets = (
            (fleet("24 GPUs", *nodes), 10.0, 3.0),
            (example("fleet-160"), 10.0, 30.0),
            (of_types(8, 1000), 15.0, 300.0),
            (example("fleet-10000"), 30.0, 3000.0),
            (example("fleet-1000000"), 30.0, None),
        )
        for cluster, limit_s, demand in fleets[1:2] if self.quick else fleets:
            objectives = {"goodput": DEFAULT_LIMITS}
            if demand is not None and not self.quick:
                objectives["throughput"] = THROUGHPUT
                objectives[f"cost of {demand:,.0f} requests/s"] = Objective(kind=ObjectiveKind.COST, demand_rps=demand)
                objectives[f"GPUs for {demand:,.0f} requests/s"] = Objective(kind=ObjectiveKind.GPUS, demand_rps=demand)
            for name, objective in objectives.items():
                yield Case(
                    name=f"{cluster.num_gpus():,} GPUs, {name}",
                    problem=self.posed(cluster, objective),
                    time_limit_s=3.0 if self.quick else limit_s,
                )

    def _curve_cases(self) -> Iterator[Case]:
        """Yield the cases of the cost curves.

        They are the paper's mix of GPUs at growing sizes under the same limits, and 1,024 GPUs of more and more types.
        """
        for times in SCALES:
            posed = self.posed(scaled(example("paper"), times), SLOWER)
            yield Case(name=f"by size: {posed.cluster.num_gpus():,} GPUs", problem=posed, time_limit_s=CURVE_LIMIT_S)
        for count in TYPE_COUNTS:
            posed = self.posed(of_types(count, GPUS_PER_TYPES_ROW), DEFAULT_LIMITS)
            name = f"by types: {GPUS_PER_TYPES_ROW:,} GPUs of {count}"
            yield Case(name=name, problem=posed, time_limit_s=CURVE_LIMIT_S)


def _row(case: Case, measured: Measured) -> Row:
    is_warm = case.name.endswith("warm")
    notes = [f"limit {case.time_limit_s:g} s"] if measured.gap > case.gap_target else []
    if is_warm:
        notes.append(f"median of {case.warm}")
    else:
        notes.append(f"{measured.import_s:.1f} s of imports before")
    if measured.violations:
        notes.append(f"the checker objects {len(measured.violations)} times: {measured.violations[0]}")
    if measured.check_s > 1.0:
        notes.append(f"checked in {measured.check_s:.1f} s after")
    if measured.note:
        notes.append(f"attention workers: {measured.note}" if measured.value else measured.note)
    timing = measured.warm if is_warm and measured.warm is not None else measured.first
    return {
        "name": case.name,
        "gpus": case.problem.cluster.num_gpus(),
        "types": len(case.problem.cluster.types_used()),
        "status": measured.status,
        "value": measured.value,
        "bound": measured.bound,
        "gap": measured.gap,
        "seconds": timing.seconds,
        "first_plan_s": timing.first_plan_s,
        "first_bound_s": timing.first_bound_s,
        "to_1_percent_s": timing.to_1_percent_s,
        "to_half_percent_s": timing.to_half_percent_s,
        "peak_mib": measured.peak_mib,
        "note": "; ".join(notes),
    }


if __name__ == "__main__":
    main()
