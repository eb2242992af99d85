"""Prompts that hold KV while they are handed over, as counted by the cost model and as simulated.

    python -m benchmarks.staging [--quick] [--json] [--cases N] [--processes N]

Random (cluster, model, workload) cases are placed with prefill and decode replicas only. The replicas that KV routes
join run together, with Poisson arrivals at the planned utilisation, and then (``_full``) with requests always waiting.
Rows are replicas, and figures are those of one stage copy, in prompts of the mean length. For a decode replica ``held``
counts prompts that have their blocks and do not decode yet; for a prefill replica, what is present of prompts that are
being prefilled or have not landed yet. ``counted`` is the room that the cost model reserves for them. ``error`` is the
excess of ``counted``, as a share of ``kv_tokens``, the whole room (``of_one``: if a decode replica had room for one
prompt). ``waiting`` counts the requests that have landed and do not decode yet, or are sent and have not landed yet;
``seats`` is the share of the seats that decode, and ``served`` the rate with requests always waiting over the planned
one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from benchmarks.measuring.saturating import (
    Case,
    Deck,
    iterations_per_request,
    random_cases,
    routed_part,
    steady_rate,
)
from hetis.planner.use_cases.simulate import seats_of
from hetis.simulator.arrivals import Load, draw_traffic, requests_of
from hetis.simulator.events import Events
from hetis.simulator.fleet import KvTransfers, SimulatedFleet, router_of
from hetis.simulator.metrics import prediction_of
from hetis.simulator.replica import ReplicaRun
from hetis.simulator.simulate import Builder
from hetis.simulator.values import FloatArray, RequestLog, Requests, Run, SaturatingSource, Settings
from hetis.solver.budget import Budget
from hetis.solver.check.memory import kv_tokens_of_a_copy, staged_prompts_of_a_copy
from hetis.solver.check.setting import Setting
from hetis.solver.errors import HetisError
from hetis.solver.plan import Plan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem

SEED = 11
SOLVE_S = 1.0  # CPU seconds
SAMPLES = 1500
QUANTILES = (5, 25, 50, 75, 95)
WARM_UP = 0.25  # share of the arrivals
MOST_ITERATIONS = 8_000
MOST_REQUESTS = 1200
ROLES = (Role.PREFILL, Role.DECODE)
AS_PLANNED = Settings(dispatch=False, redispatch=False)


@dataclass(slots=True)
class Watch:
    """Samples of what every replica holds of prompts that are handed over, [samples] per replica.

    A sample is: KV tokens of these prompts, those that wait (landed and not decoding yet, or sent and not landed yet),
    and the requests that decode.
    """

    fleet: SimulatedFleet
    events: Events
    log: RequestLog
    every_s: float
    times_s: list[float] = field(default_factory=list)
    samples: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)

    def of(self, number: int, run: Run) -> FloatArray:
        """Return the samples of a replica from the warm-up to the last arrival, [3, samples]."""
        times_s, last_s = np.array(self.times_s), run.arrival_s.max()
        inside = (times_s > WARM_UP * last_s) & (times_s < last_s)
        samples: FloatArray = np.array(self.samples[number], dtype=float).reshape(-1, 3)[inside].T
        return samples

    def tick(self, now_s: float) -> None:
        """Sample all replicas now, and again later unless no event is left."""
        if self.events.is_empty:
            return
        self.times_s.append(now_s)
        for replica in self.fleet.replicas:
            self.samples.setdefault(replica.number, []).append(self._sample(replica))
        self.events.at(now_s + self.every_s, self.tick)

    def _sample(self, replica: ReplicaRun) -> tuple[int, int, int]:
        log, batches, cached = self.log, replica.batches, replica.growth.cached
        if replica.decodes:
            ready = [request for batch in batches for request in batch.ready]
            whole = [*ready, *(request for batch in batches for request in batch.reserved)]
            decoding = sum(len(batch.decoding) for batch in batches)
            return sum(cached(log.target[request]) for request in whole), len(ready), decoding
        sending = [request for batch in batches for request in batch.sending]
        under_way = {request for batch in batches for request in batch.prefilling}
        under_way |= {request for batch in batches for request, _, _ in batch.chunk}
        tokens = sum(cached(log.target[request]) for request in sending)
        return tokens + sum(cached(log.filled[request]) for request in under_way), len(sending), 0


def main() -> None:
    """Print one row per replica."""
    parser = rows.parser("benchmarks.staging", __doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    count = 4 if arguments.quick else arguments.cases
    cases = [case for case in random_cases(count, arguments.seed) if arguments.only in case.name]
    found = staging_rows(cases, arguments.processes)
    if arguments.json:
        rows.show(found, arguments, name="staging")
        return
    rows.show(summary(list(found)), arguments, name="staging")


def staging_rows(cases: Sequence[Case], processes: int) -> Iterator[Row]:
    """Yield the rows of all cases."""
    with ProcessPoolExecutor(max_workers=processes) as pool:
        for found in pool.map(rows_of_case, cases):
            yield from found


def summary(found: Sequence[Row]) -> Iterator[Row]:
    """Yield the quantiles of every error, by role and load."""
    for role in ROLES:
        for load, label in (("", "at the planned utilisation"), ("_full", "always waiting")):
            for figure in ("held", "counted", "error", "error_p95", "of_one"):
                column = figure if figure == "counted" else figure + load
                values = [row[column] for row in found if row["role"] == role.value and row.get(column) is not None]
                if not values or (figure == "of_one" and role is Role.PREFILL):
                    continue
                quantiles = np.percentile(np.array(values, dtype=float), QUANTILES)
                row: dict[str, str | int | float | None] = {"name": f"{role.value}, {label}: {figure}"}
                row["replicas"] = len(values)
                row |= {f"p{q}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
                yield row


def rows_of_case(case: Case) -> list[Row]:
    """Return one row per replica, or none if there is no plan."""
    problem = replace(case.problem, family=replace(case.problem.family, roles=ROLES))
    try:
        budget = Budget(time_limit_s=SOLVE_S, clock=time.process_time)
        plan = routed_part(solve_placement(problem, budget=budget, gap_target=0.05))
    except HetisError:
        return []  # the model fits on none of these GPUs, or no plan meets the limits
    if plan is None:
        return []
    needed = min(2 * seats_of(plan), 2 * MOST_REQUESTS)
    count = int(max(needed, min(MOST_REQUESTS, MOST_ITERATIONS / iterations_per_request(plan, problem))))
    rate = prediction_of(plan).rate_rps
    load = Load(
        lengths=problem.workload,
        max_position=problem.model.max_position,
        rate_rps=rate * problem.assumptions.planned_utilisation,
    )
    workload = problem.workload.clipped_to(problem.model.max_position)
    loads: dict[str, Requests] = {
        "": requests_of(draw_traffic(load, count, seed=SEED)),
        "_full": Deck(workload, count, SEED),
    }
    seen = {name: watched(problem, plan, requests, count / rate) for name, requests in loads.items()}
    served = steady_rate(seen["_full"][0], seats_of(plan)) / rate
    result: list[Row] = []
    for number, one in enumerate(plan.replicas):
        setting = Setting(
            problem=problem, moments=workload.moments(block_tokens=problem.assumptions.block_tokens),
            micro_batch=one.micro_batch, in_flight=one.in_flight, chunk_tokens=one.chunk_tokens, role=one.role,
        )  # fmt: skip
        copies = max(stage.copies for stage in one.stages)
        room = kv_tokens_of_a_copy(setting, copies)
        prompt = problem.model.cached_tokens(setting.moments.mean_prompt)
        counted = staged_prompts_of_a_copy(setting, copies)
        if one.role is Role.PREFILL:
            counted = room / prompt
        row: dict[str, str | int | float | None] = {
            "name": f"{case.name} #{number}",
            "role": one.role.value,
            "copies": copies,
            "M": one.in_flight,
            "b": one.micro_batch,
            "C": one.chunk_tokens,
            "prompt": prompt,
            "kv_tokens": room,
            "counted": counted,
            "served": served,
        }
        for name, (run, watch) in seen.items():
            held, lingering, seats = watch.of(number, run) / copies
            if not len(held):
                continue
            row[f"held{name}"] = held.mean() / prompt
            row[f"held_p95{name}"] = np.percentile(held, 95) / prompt
            row[f"waiting{name}"] = lingering.mean()
            row[f"seats{name}"] = seats.mean() * copies / max(1, one.micro_batch * one.in_flight)
            row[f"error{name}"] = (counted * prompt - held.mean()) / room
            row[f"error_p95{name}"] = (counted * prompt - np.percentile(held, 95)) / room
            row[f"of_one{name}"] = (prompt - held.mean()) / room
        result.append(row)
    return result


def watched(problem: PlacementProblem, plan: Plan, requests: Requests, expected_s: float) -> tuple[Run, Watch]:
    """Return a run of the plan and what its replicas held."""
    log, events = RequestLog(), Events()
    builder = Builder(plan, problem, log, events, AS_PLANNED)
    fleet = SimulatedFleet(builder.replicas(), log, events, router_of(AS_PLANNED))
    fleet.transfers = KvTransfers(plan, problem, builder.fleet, fleet.replicas, log, events, fleet.route, builder.links)
    watch = Watch(fleet, events, log, expected_s / SAMPLES)
    if isinstance(requests, SaturatingSource):
        fleet.serve_all(requests)
    else:
        fleet.serve(iter(requests))
    events.at(watch.every_s, watch.tick)
    return log.run(events.run(), None), watch


if __name__ == "__main__":
    main()
