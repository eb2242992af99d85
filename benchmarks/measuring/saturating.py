"""Plans under simulated load, over seeds: saturated rates, also of random placements' replicas, and latencies."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.measuring.instances import problem
from hetis.formats.documents import from_data
from hetis.planner.use_cases.simulation.simulate import seats_of
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Metrics, Summary, summarise
from hetis.simulator.running import SimulationJob, SimulationRunner, runner
from hetis.simulator.simulate import simulate
from hetis.simulator.timing import StageTiming
from hetis.simulator.values import Request, Run, Settings
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Objective, ObjectiveKind, Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import Workload

GPUS = (
    "H100-SXM-80GB", "A100-SXM-80GB", "A100-PCIe-40GB", "L40S", "A10G", "L4", "V100-SXM2-32GB", "T4", "RTX-3090",
    "RTX-4090", "P100-PCIe-16GB", "A40",
)  # fmt: skip
MODELS = (
    "Llama-2-7B", "Llama-2-13B", "Llama-2-70B", "OPT-13B", "OPT-30B", "Llama-3-8B", "Mistral-7B", "Qwen2.5-32B",
    "Mixtral-8x7B", "Qwen3-30B-A3B",
)  # fmt: skip
WORKLOADS = (
    "azure_conv_2023", "sharegpt_8k_lengths", "sharegpt_first_turn_lengths", "arxiv_summarization_lengths",
    "humaneval_lengths", "longbench_lengths",
)  # fmt: skip
OBJECTIVES = (
    Objective(),
    Objective(ttft_limit_s=None, tpot_limit_s=0.05),
    Objective(ttft_limit_s=5.0, tpot_limit_s=0.2),
    Objective(kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=None, tpot_limit_s=None),
)
ALTERNATING = 20_000  # iterations
DECK = 2000  # requests drawn at even quantiles of the workload before lengths repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A placement to measure."""

    name: str
    problem: PlacementProblem


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """Yield fleets of one to three GPU types and 2 to 16 GPUs, with any model likely to fit and any workload."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        cluster = _random_cluster(rng, number)
        model, workload = str(rng.choice(MODELS)), str(rng.choice(WORKLOADS))
        objective = OBJECTIVES[int(rng.integers(len(OBJECTIVES)))]
        posed = problem(cluster, model=model, workload=workload, objective=objective)
        yield Case(name=f"{number}: {cluster.name}, {model}, {workload}", problem=posed)


class Deck:
    """A source that deals a workload's lengths at even quantiles, shuffled, so that it has the workload's averages."""

    def __init__(self, workload: Workload, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        size = min(DECK, count)
        cumulative = np.cumsum([b.weight for b in workload.bins])
        chosen = np.searchsorted(cumulative, (np.arange(size) + 0.5) / size * cumulative[-1])
        lengths = [(max(1, round(b.prompt_tokens)), max(1, round(b.output_tokens))) for b in workload.bins]
        self._left = itertools.islice(self._dealt([lengths[i] for i in chosen], rng), count)

    def next_request(self, now_s: float) -> Request | None:
        """Return the next card, or None when all are dealt."""
        card = next(self._left, None)
        if card is None:
            return None
        number, (prompt, output) = card
        return Request(id=number, arrival_s=now_s, prompt_tokens=prompt, output_tokens=output)

    def _dealt(self, cards: list[tuple[int, int]], rng: np.random.Generator) -> Iterator[tuple[int, tuple[int, int]]]:
        number = itertools.count()
        while True:
            for i in rng.permutation(len(cards)):
                yield next(number), cards[i]


def distinct_replicas(plan: Plan) -> list[ReplicaPlan]:
    """Return the first replica of every shape in a plan, unified ones only."""
    first: dict[object, ReplicaPlan] = {}
    for one in plan.replicas:
        if one.role is not Role.UNIFIED:
            continue
        stages = tuple((s.gpu, s.tp, s.copies, s.num_layers, s.kv_head_groups_kept) for s in one.stages)
        pools = tuple((p.stage, p.gpu, len(p.devices), p.kv_head_groups) for p in one.attention_workers)
        first.setdefault((stages, pools, one.micro_batch, one.in_flight, one.chunk_tokens), one)
    return list(first.values())


def part_of(plan: Plan, *chosen: ReplicaPlan) -> Plan:
    """Return these replicas of a plan, and the KV routes between them."""
    at = {plan.replicas.index(one): number for number, one in enumerate(chosen)}
    routes = tuple(
        replace(route, prefill=at[route.prefill], decode=at[route.decode])
        for route in plan.kv_routes
        if route.prefill in at and route.decode in at
    )
    return replace(plan, replicas=chosen, kv_routes=routes)


def routed_part(plan: Plan) -> Plan | None:
    """Return the prefill and decode replicas that KV routes connect, or None if there are none."""
    joined = sorted({end for route in plan.kv_routes for end in (route.prefill, route.decode)})
    return part_of(plan, *(plan.replicas[number] for number in joined)) if joined else None


def saturated_run(part: Plan, problem: PlacementProblem, count: int, settings: Settings) -> Run:
    """Run part of a plan on ``count`` always-waiting requests."""
    workload = problem.workload.clipped_to(problem.model.max_position)
    return simulate(part, problem, Deck(workload, count, settings.seed), settings)


def steady_rate(run: Run, in_flight: int) -> float:
    """Return completions per second from when requests have been replaced twice until the last one has arrived."""
    finished = np.sort(run.finished_s[~np.isnan(run.finished_s)])
    first = min(max(2 * in_flight, len(finished) // 4), len(finished) // 2)
    last = int(np.searchsorted(finished, run.arrival_s.max()))
    if last <= first:
        return float("nan")
    return (last - first) / float(finished[last - 1] - finished[first - 1])


def iterations_per_request(plan: Plan, problem: PlacementProblem) -> float:
    """Return micro-batch round trips per served request, summed over the replicas that it passes."""
    moments = problem.workload.clipped_to(problem.model.max_position).moments()
    prefill = decode = served = 0.0
    for one in plan.replicas:
        outputs = moments.mean_output / one.micro_batch if one.micro_batch else 0.0
        chunks = moments.mean_prompt / one.chunk_tokens if one.chunk_tokens else 0.0
        if one.role is Role.PREFILL:
            prefill += one.rate * chunks
        else:
            decode += one.rate * max(outputs, chunks)
            served += one.rate
    return (prefill + decode) / served


def alternating_rate(problem: PlacementProblem, one: ReplicaPlan, seed: int = 0) -> float:
    """Return requests/s if iterations took the formula's time, full chunks at the mean context, but came individually.

    Each iteration of a micro-batch carries a chunk at random, with the formula's share phi (always for a prefill
    replica, never for a decode replica). A micro-batch stays on its copy of a stage. The loss against the planned rate
    is what slack should have covered. The time to send or receive KV is not included.
    """
    plain_s, chunk_s = _formula_seconds(problem, one)
    moments = problem.workload.clipped_to(problem.model.max_position).moments()
    chunks = moments.mean_prompt / one.chunk_tokens if one.chunk_tokens else 0.0
    per_request = max(moments.mean_output / one.micro_batch if one.micro_batch else 0.0, chunks)
    rng = np.random.default_rng(seed)
    free_s = [[0.0] * stage.copies for stage in one.stages]
    last = len(one.stages) - 1
    events = [(0.0, m, m, 0) for m in range(one.in_flight)]
    carries = [False] * one.in_flight
    order, done, began_s, now_s = len(events), 0, 0.0, 0.0
    while done < ALTERNATING:
        arrived_s, _, m, s = heapq.heappop(events)
        if s == 0:
            carries[m] = rng.random() < chunks / per_request
        copy = m % len(free_s[s])
        end_s = max(arrived_s, free_s[s][copy]) + (chunk_s[s] if carries[m] else plain_s[s])
        free_s[s][copy] = end_s
        order += 1
        heapq.heappush(events, (end_s, order, m, s + 1 if s < last else 0))
        if s == last:
            done, now_s = done + 1, max(now_s, end_s)
            began_s = now_s if done == ALTERNATING // 5 else began_s
    return (ALTERNATING - ALTERNATING // 5) / (now_s - began_s) / per_request


def _formula_seconds(problem: PlacementProblem, one: ReplicaPlan) -> tuple[list[float], list[float]]:
    """Return the cost model's seconds per iteration without and with a chunk, for every stage (without workers)."""
    model, moments = problem.model, problem.workload.clipped_to(problem.model.max_position).moments()
    b, chunk = one.micro_batch, one.chunk_tokens
    decoding = b, b * model.attended_tokens(moments.resident_context)
    attended = model.attended_tokens(moments.prefill_pairs / moments.mean_computed)
    shape = replica_shape(one, problem, Fleet.of(problem.cluster))
    timings = [
        StageTiming(problem, stage, is_first=n == 0, is_last=n == len(shape.stages) - 1)
        for n, stage in enumerate(shape.stages)
    ]
    plain_s = [timing.seconds(*decoding, 0, 0.0, 0.0, b) for timing in timings]
    chunk_s = [timing.seconds(*decoding, chunk, chunk * attended, attended + chunk / 2, b + 1) for timing in timings]
    return plain_s, chunk_s


def _random_cluster(rng: np.random.Generator, number: int) -> Cluster:
    types = rng.choice(GPUS, size=int(rng.integers(1, 4)), replace=False)
    nodes, names = list[dict[str, object]](), list[str]()
    for index, gpu in enumerate(types):
        count, gpus = int(rng.integers(1, 3)), int(rng.choice((1, 2, 4)))
        nodes.append({"name": f"n{index}", "count": count, "gpus": [{"type": str(gpu), "count": gpus}]})
        names.append(f"{count}x{gpus} {gpu}")
    document = {
        "apiVersion": "hetis/v1",
        "kind": "Cluster",
        "name": " + ".join(names),
        "nodes": nodes,
        "network": {"bandwidth": str(rng.choice(("10Gbps", "25Gbps", "100Gbps"))), "latency": "20us"},
    }
    cluster = from_data(document, name=f"case {number}")
    assert isinstance(cluster, Cluster)
    return cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A plan under load.

    Attributes:
        lengths: lengths of the requests, not clipped.
        seeds: number of runs of each load.
        turns: how often a run, of at least ``at_least`` requests, refills the requests that the plan holds.
    """

    runs: SimulationRunner
    lengths: Workload
    seeds: int
    turns: int
    at_least: int

    def saturated(self, settings: Settings | None = None) -> tuple[Summary, list[float]]:
        """Return the summary, and the throughput by seed in requests/s, with requests always waiting."""
        # Always-waiting requests of equal length do not depend on the seed.
        num = 1 if len(self.lengths.bins) == 1 else self.seeds
        metrics = self._measured(self._load(Arrivals.SATURATED, None), settings, num) * (self.seeds // num)
        return summarise(metrics), [one.throughput_rps.value for one in metrics]

    def at(self, rate_rps: float, settings: Settings | None = None) -> Summary:
        """Return the summary for Poisson arrivals."""
        return summarise(self._measured(self._load(Arrivals.DRAWN, rate_rps), settings, self.seeds))

    def _load(self, arrivals: Arrivals, rate_rps: float | None) -> Load:
        context = self.runs.problem.model.max_position
        return Load(lengths=self.lengths, max_position=context, arrivals=arrivals, rate_rps=rate_rps)

    def _measured(self, load: Load, settings: Settings | None, num: int) -> list[Metrics]:
        count = max(self.at_least, self.turns * seats_of(self.runs.plan))
        jobs = [
            SimulationJob(
                load=load,
                num_requests=count,
                seed=seed,
                settings=replace(settings or Settings(), seed=seed),
                limits=self.runs.problem.objective,
            )
            for seed in range(num)
        ]
        return [answer.metrics for answer in self.runs.run(jobs)]


@contextmanager
def served(
    plan: Plan,
    problem: PlacementProblem,
    lengths: Workload,
    *,
    seeds: int,
    turns: int,
    at_least: int = 400,
    processes: int,
) -> Iterator[Server]:
    """Yield a plan under load, whose runs use ``processes`` separate processes (1: this process)."""
    with runner(plan, problem, processes=processes) as runs:
        yield Server(runs=runs, lengths=lengths, seeds=seeds, turns=turns, at_least=at_least)
