"""Prefill, decode attention and the rest of decode on separate GPUs, compared with strategies that keep some together.

    python -m benchmarks.hexgen3 [--quick] [--json]

`hexgen3` gives every kind of work its own GPUs: prefill replicas, stages of decode replicas without any KV, and
attention workers with all of it. Beside it are `hexgen2` (prefill and decode apart), `hexgen` (neither) and `hetis`
(whatever pays, all of these among it). Fleets have weak cards, few or none, or two types of which one reads memory
faster than it computes (H20), on links of 100 Gb/s with 20 us, or of 400 Gb/s with 5 us; others are drawn at random.
TTFT is unlimited. Columns are goodput in requests/s; 0 means no plan.

In `hexgen3` a stage waits while its workers attend. Attention-FFN disaggregation lets several micro-batches take turns,
so that neither waits: ``turns_bound`` bounds what any plan of `hexgen3` could serve then, for a layer takes no less
than the longest of its dense work, its attention and its exchange. A request still needs them one after another, which
the bound leaves out, so that it is too high under a tight limit on TPOT. ``over_rest`` is the value of `hexgen3` over
the best of `hexgen` and `hexgen2`, and ``turns_over_hetis`` is ``turns_bound`` over the value of `hetis`: below 1,
taking turns would not help `hexgen3` past what `hetis` serves without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import fleet, problem
from benchmarks.measuring.rows import Row
from benchmarks.strategies import FAILED, answer
from hetis.solver.budget import Budget, SearchSettings
from hetis.solver.cluster import Cluster, Link, Network
from hetis.solver.cost import DeviceCost, PoolCost, intra_link, rank_shape
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.fleet import Part
from hetis.solver.placement.search import search
from hetis.solver.placement.stage_cost import pool_entry
from hetis.solver.placement.tables import CostTables, FloatArray, Tables
from hetis.solver.placement.tabulation import build_cost_tables
from hetis.solver.plan import Objective, Role
from hetis.solver.problem import PlacementProblem

BESIDE = ("hexgen", "hexgen2", "hexgen3", "hetis")
LENGTHS = ("1024/256", "8000/300", "500/2000")
TPOT_LIMITS_S = (None, 0.1)
QUICK_NETWORK = Network(default=Link(bytes_per_s=5e10, latency_s=5e-6))
RANDOM_CASES = 40
STRONG = ("H200-SXM-141GB", "H100-SXM-80GB", "A100-SXM-80GB", "L40S")
BETWEEN = ("A100-PCIe-40GB", "L40S")
WEAK = ("H20", "RTX-A6000", "V100-SXM2-32GB", "RTX-3090", "T4", "P100-PCIe-12GB")
MODELS = ("Llama-3.1-8B", "Llama-3.1-70B", "Qwen3-32B", "Mixtral-8x7B")
TIME_LIMIT_S = 8.0
GAP = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fleet under load."""

    name: str
    problem: PlacementProblem


def main() -> None:
    """Print one row per fleet, lengths and limit."""
    parser = rows.parser("benchmarks.hexgen3", __doc__)
    arguments = parser.parse_args()
    chosen = (case for case in cases(quick=arguments.quick) if arguments.only in case.name)
    rows.exit_if_crashed(rows.show(map(compare, chosen), arguments, name="hexgen3"))


def cases(*, quick: bool) -> Iterator[Case]:
    """Yield every combination, or only the first one if ``quick``."""
    for name, cluster, model in list(_fleets())[: 1 if quick else None]:
        for tpot_s in TPOT_LIMITS_S[: 1 if quick else None]:
            for lengths in LENGTHS[: 1 if quick else None]:
                objective = Objective(ttft_limit_s=None, tpot_limit_s=tpot_s)
                posed = problem(cluster, model=model, workload=lengths, objective=objective)
                yield Case(name=f"{name}, {lengths}, {_limit(tpot_s)}", problem=posed)
    if not quick:
        yield from map(_random_case, range(RANDOM_CASES))


def _random_case(seed: int) -> Case:
    """Return two or three kinds of nodes, a model, lengths, a limit and a network."""
    random = np.random.default_rng(seed)
    nodes = [(1, int(random.choice((2, 4))), str(random.choice(STRONG)))]
    nodes.append((int(random.integers(1, 3)), 4, str(random.choice(WEAK))))
    if random.random() < 0.5:
        nodes.append((1, int(random.choice((2, 4))), str(random.choice(BETWEEN))))
    model, lengths = str(random.choice(MODELS)), str(random.choice((*LENGTHS, "16000/1000")))
    tpot_s = (None, 0.1, 0.05)[int(random.integers(3))]
    described = " + ".join(
        f"{count * each} {gpu.replace('-SXM2', '').replace('-SXM', '').replace('-PCIe', '')}"
        for count, each, gpu in nodes
    )
    cluster, links = fleet(described, *nodes), ""
    if random.random() < 0.5:
        cluster, links = replace(cluster, network=QUICK_NETWORK), ", 400 Gb/s"
    posed = problem(cluster, model=model, workload=lengths, objective=Objective(ttft_limit_s=None, tpot_limit_s=tpot_s))
    return Case(name=f"random {seed}: {described}, {model}{links}, {lengths}, {_limit(tpot_s)}", problem=posed)


def _limit(tpot_s: float | None) -> str:
    return "no limit" if tpot_s is None else f"TPOT {1e3 * tpot_s:g} ms"


def _fleets() -> Iterator[tuple[str, Cluster, str]]:
    """Yield fleets, and the model of each."""
    dense, moe = "Llama-3.1-70B", "Mixtral-8x22B"
    for name, nodes, model in (
        ("4 H100 + 8 P100", ((1, 4, "H100-SXM-80GB"), (2, 4, "P100-PCIe-12GB")), dense),
        ("2 H100 + 8 L4", ((1, 2, "H100-SXM-80GB"), (2, 4, "L4")), dense),
        ("4 H100 + 4 RTX 3090", ((1, 4, "H100-SXM-80GB"), (1, 4, "RTX-3090")), dense),
        ("8 H100", ((1, 8, "H100-SXM-80GB"),), dense),
    ):
        yield name, fleet(name, *nodes), model
    for num_nodes, model in ((1, dense), (2, moe)):
        name = f"{4 * num_nodes} L40S + 4 H20, {model}"
        cluster = fleet(name, (num_nodes, 4, "L40S"), (1, 4, "H20"))
        yield name, cluster, model
        yield f"{name}, 400 Gb/s", replace(cluster, network=QUICK_NETWORK), model


def compare(case: Case) -> Row:
    """Solve a case by every strategy, and bound what taking turns could add."""
    answers = {name: answer(case.problem, name, time_limit_s=TIME_LIMIT_S) for name in BESIDE}
    hetis, apart = answers["hetis"], answers["hexgen3"]
    rest = max(answers["hexgen"].value, answers["hexgen2"].value)
    turns = turns_bound(case.problem)
    crashed = any(found.status == FAILED for found in answers.values())
    return {
        "name": case.name,
        "status": FAILED if crashed else hetis.status,
        **{name: found.value for name, found in answers.items()},
        "hexgen3_bound": apart.bound,
        "hetis_bound": hetis.bound,
        "turns_bound": turns,
        "over_rest": apart.value / rest if rest > 0.0 else None,
        "turns_over_hetis": turns / hetis.value if hetis.value > 0.0 else None,
        "seconds": sum(found.seconds for found in answers.values()),
    }


def turns_bound(posed: PlacementProblem) -> float:
    """Return an upper bound on goodput in the family of `hexgen3` if no stage ever waited for its workers."""
    restricted = replace(posed, family=STRATEGIES["hexgen3"].restrict(posed.family))
    costs = build_cost_tables(restricted)
    turning = replace(
        costs, scopes=tuple(scope.changed(lambda t: _without_waiting(costs, t)) for scope in costs.scopes)
    )
    budget = Budget(time_limit_s=TIME_LIMIT_S, clock=time.process_time)
    outcome = search(turning, SearchSettings(strategy="hexgen3", budget=budget, gap_target=GAP))
    if outcome is None:
        return np.inf if budget.is_spent() else 0.0
    return outcome.bound * posed.assumptions.planned_utilisation


def _without_waiting(costs: CostTables, t: Tables) -> Tables:
    """Return tables in which decode layers with a pool take the longest of dense work, attention and exchange.

    Entries hold the time that attention adds to the dense work. No plan of `hexgen3` has those below all head groups.
    """
    pool_s, least_s = t.pool_s.copy(), t.least_pool_s.copy()
    sizes = np.array(costs.pool_sizes, dtype=float)
    decoding = [x for x, mix in enumerate(costs.mixes) if mix.role is Role.DECODE]
    batches = np.array([costs.mixes[x].micro_batch for x in decoding], dtype=float)[:, None]
    iterations = t.iterations[decoding][:, None]
    for s, q in zip(*np.nonzero(t.pool_start >= 0), strict=True):
        pool, groups = _pool(costs, s, q), int(t.rank_groups[s])
        loads = pool.load(batches, groups, sizes)
        worker_s = pool.worker.decode_attention_s(loads, pool.primary.shape.queries_per_group)
        apart_s = np.maximum(worker_s, pool.exchange_s(batches, groups, sizes))
        added: FloatArray = np.maximum(0.0, iterations * apart_s - t.layer_s[decoding, s][:, None])
        entry, least = pool_entry(t, s, q, groups, 0), t.least_pool_start[s, q]
        pool_s[np.ix_(decoding, range(entry, entry + len(sizes)))] = added
        least_s[np.ix_(decoding, range(least, least + len(sizes)))] = added
    return t._replace(pool_s=pool_s, least_pool_s=least_s)


def _pool(costs: CostTables, s: int, q: int) -> PoolCost:
    """Return the costs of a pool of class q beside ranks of type s, in the one zone that these fleets have."""
    place, tp = costs.ranks[s]
    own, other = costs.classes[place], costs.classes[q]
    link = own.link_in(costs.problem.cluster, Part((own.zone,)))
    link = link.slower_of(other.link_in(costs.problem.cluster, Part((other.zone,))))

    def device(gpu: str, size: int) -> DeviceCost:
        shape = rank_shape(costs.problem.model, size)
        assert shape is not None, "rank types are valid shapes"
        intra = intra_link(costs.problem.cluster.gpu_types[gpu], None)
        return DeviceCost(costs.problem.model, costs.problem.profiles[gpu], costs.moments, shape, intra)

    return PoolCost(device(own.gpu, tp), device(other.gpu, 1), link)


if __name__ == "__main__":
    main()
