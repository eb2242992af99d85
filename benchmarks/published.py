"""Published heuristics beside the proven optimum of what an engine runs.

    python -m benchmarks.published [--quick] [--json]

The ratio of `hexgen2-paper` is its value over the proven bound of `hexgen2`, that of `hetis-paper` its value over that
of `hetis`. No ratio is a proof: the heuristics' plans have stages of unlike TP, several stages that decode, or workers
that all stages share, which no engine runs, so that it may be above 1. The fleets are those of both papers, where known
(HexGen-2's setting 1 is recalled, not verified: 2 H100, 6 A100, 4 L40, 8 A6000), and random ones: 8 to 32 GPUs of two
to four types. The model is Llama-2-70B unless the name says OPT-30B, with the lengths (prompt/output tokens) and limits
in the name, if any. ``seconds`` are those of the heuristic, ``proof_s`` those of the strategy with the bound, both
after kernels were compiled.

A heuristic without a plan has a ratio of 0, or no ratio if no plan exists at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import NO_LIMITS, Case, example, fleet, problem
from benchmarks.measuring.rows import Row
from benchmarks.measuring.solving import FAILED, Solve, measure
from hetis.planner.use_cases.grouping import gpu_counts
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Objective

PROVEN = {"hexgen2-paper": "hexgen2", "hetis-paper": "hetis"}
TIME_LIMIT_S = 6.0
HEURISTIC_LIMIT_S = 120.0  # HexGen-2's paper reports 90 to 120 s
TYPES = ("H100-SXM-80GB", "A100-SXM-80GB", "A100-PCIe-40GB", "L40S", "RTX-A6000", "A10G", "L4", "RTX-3090", "T4")
RANDOM_FLEETS = 8
# Heavy and light prefill (above and below 512 tokens) and decode (128 tokens), as in HexGen-2.
LENGTHS = ("1024/64", "1024/256", "256/256", "256/64")


def main() -> None:
    """Print two rows per case, one for each heuristic, and then the summary."""
    parser = rows.parser("benchmarks.published", __doc__)
    arguments = parser.parse_args()
    if not arguments.quick:
        _compile()
    chosen = (case for case in cases(quick=arguments.quick) if arguments.only in case.name)
    shown = rows.show((row for case in chosen for row in compare(case)), arguments, name="published")
    rows.exit_if_crashed(shown)


def _compile() -> None:
    """Solve everything that is compiled once (sub-fleets and column generation), so that no row includes it."""
    for cluster in (example("h100-l4"), random_fleet(0)):
        for strategy in (*PROVEN, *PROVEN.values()):
            posed = problem(cluster, workload="1024/256", objective=NO_LIMITS)
            measure(Solve(problem=posed, strategy=strategy, time_limit_s=120.0))


def cases(*, quick: bool) -> Iterator[Case]:
    """Yield the papers' fleets, then random ones."""
    for name, cluster, model in _fleets_of_papers():
        for lengths in LENGTHS[1:2] if quick else LENGTHS[1::2]:
            yield _case(f"{name}, {lengths}", cluster, model=model, lengths=lengths)
        if quick:
            return
    slow = Objective(ttft_limit_s=None, tpot_limit_s=0.1)
    yield _case("paper, 1024/256, TPOT 100 ms", example("paper"), lengths="1024/256", objective=slow)
    for seed in range(RANDOM_FLEETS):
        cluster = random_fleet(seed)
        lengths = LENGTHS[seed % len(LENGTHS)]
        yield _case(f"random {seed}: {_described(cluster)}, {lengths}", cluster, lengths=lengths)


def _case(
    name: str, cluster: Cluster, *, lengths: str, model: str = "Llama-2-70B", objective: Objective = NO_LIMITS
) -> Case:  # fmt: skip
    return Case(name=name, problem=problem(cluster, model=model, workload=lengths, objective=objective))


def _fleets_of_papers() -> Iterator[tuple[str, Cluster, str]]:
    yield "paper", example("paper"), "Llama-2-70B"
    recalled = fleet(
        "hexgen2-1", (1, 2, "H100-SXM-80GB"), (3, 2, "A100-SXM-80GB"), (1, 4, "L40"), (2, 4, "RTX-A6000")
    )  # fmt: skip
    yield "HexGen-2 setting 1", recalled, "Llama-2-70B"
    yield "HexGen-2 setting 1, OPT-30B", recalled, "opt-30b"
    yield "8 H100", fleet("8 H100", (1, 8, "H100-SXM-80GB")), "Llama-2-70B"


def random_fleet(seed: int) -> Cluster:
    """Return 8 to 32 GPUs that hold the model more than twice: two to four kinds of nodes with one to eight GPUs."""
    random = np.random.default_rng(seed)
    while True:
        kinds = random.choice(len(TYPES), size=int(random.integers(2, 5)), replace=False)
        nodes = [(int(random.integers(1, 4)), int(random.choice((1, 2, 4, 8))), TYPES[kind]) for kind in kinds]
        cluster = fleet(f"random-{seed}", *nodes)
        memory = sum(cluster.gpu_types[gpu].memory_bytes * count for gpu, count in gpu_counts(cluster).items())
        if 8 <= cluster.num_gpus() <= 32 and memory > 400e9:
            return cluster


def _described(cluster: Cluster) -> str:
    return " + ".join(f"{count} {gpu.split('-')[0]}" for gpu, count in gpu_counts(cluster).items())


def compare(case: Case) -> Iterator[Row]:
    """Yield one row per heuristic."""
    for heuristic, strategy in PROVEN.items():
        ours = measure(Solve(problem=case.problem, strategy=heuristic, time_limit_s=HEURISTIC_LIMIT_S))
        proven = measure(Solve(problem=case.problem, strategy=strategy, time_limit_s=TIME_LIMIT_S))
        objections = [*ours.violations, *proven.violations]
        best = proven.bound if heuristic == "hexgen2-paper" else proven.value
        yield {
            "name": f"{case.name}: {heuristic}",
            "gpus": case.problem.cluster.num_gpus(),
            "types": len(case.problem.cluster.types_used()),
            "status": FAILED if objections or FAILED in (ours.status, proven.status) else ours.status,
            "value": ours.value,
            "proven_value": proven.value,
            "proven_bound": proven.bound,
            "ratio": ours.value / best if best > 0.0 and math.isfinite(best) else math.inf,
            "seconds": ours.first.seconds,
            "proof_s": proven.first.seconds,
            "note": f"the checker objects: {objections[0]}" if objections else ours.note or proven.note,
        }


if __name__ == "__main__":
    main()
