"""Copies that share their experts: they iterate together, take as long as the longest, and fail together."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest

from hetis.simulator.disciplines import Lockstep
from hetis.simulator.simulate import simulate
from hetis.simulator.timing import StageTiming
from hetis.simulator.values import Fault, Settings
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.check.setting import Setting
from hetis.solver.check.timing import stage_seconds
from hetis.solver.cluster import Link
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import ReplicaPlan, Role, StagePlan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.models import replace, shape_of
from tests.simulator.small_plans import equal_requests, plan_of
from tests.solver.best_replicas import setting_of
from tests.solver.instances import SMALL_FAMILY, make_model, make_node, make_problem, make_profile, make_workload

EXPERTS = shape_of(num_experts=8, active_experts=2, expert_intermediate=256, first_dense_layers=1)
APART = Settings(dispatch=False, redispatch=False)


def problem_of(model: ModelSpec | None = None, nodes: int = 1) -> PlacementProblem:
    return make_problem(
        [make_node("a", "A", gpus=4, nodes=nodes)],
        profiles={"A": make_profile("A", usable_bytes=60_000_000)},
        model=model or make_model(kv_heads=1, moe=EXPERTS),
        workload=make_workload((60, 40)),
        family=SMALL_FAMILY,
    )


def sharing(problem: PlacementProblem, copies: int = 4, *, micro_batch: int = 4, chunk_tokens: int = 64) -> ReplicaPlan:
    stage = StagePlan(
        gpu="A", tp=1, copies=copies, first_layer=0, num_layers=problem.model.num_layers, kv_head_groups_kept=1,
        devices=tuple(f"a/{i}" for i in range(copies)),
    )  # fmt: skip
    return ReplicaPlan(
        rate=1.0, ttft_s=0.1, tpot_s=0.01, micro_batch=micro_batch, in_flight=copies, chunk_tokens=chunk_tokens,
        kv_tokens=1000, stages=(stage,), expert_parallel=True,
    )  # fmt: skip


def test_an_iteration_takes_what_the_document_says() -> None:
    problem = problem_of()
    shape = replica_shape(sharing(problem), problem, Fleet.of(problem.cluster)).stages[0]
    timing = StageTiming(problem, shape, is_first=True, is_last=True, attention_dp=4)
    # A single copy with a chunk: elsewhere there are three times b tokens, or three times b and C.
    at_once = Link(bytes_per_s=1e30, latency_s=0.0)  # KV arrives sooner than iterations need it
    setting = setting_of(problem, role=Role.DECODE, b=4, M=4, C=0, d=4)
    stage_s = stage_seconds(setting, replace(shape, arrival_link=at_once), is_first=True, is_last=True)
    plain = stage_s / setting.iterations
    y = setting.moments.resident_context * busiest(setting)
    assert timing.seconds(4, 4 * y, 0, 0.0, 0.0, 4, 12) == pytest.approx(plain, rel=1e-9)
    alone = timing.seconds(4, 4 * y, 0, 0.0, 0.0, 4)
    assert alone < plain < timing.seconds(4, 4 * y, 0, 0.0, 0.0, 4, 12 + 3 * 64)


def busiest(setting: Setting) -> float:
    """Return the context of the busiest of four copies, for which the document states iterations."""
    return 1 + 1.0293753730 * setting.moments.resident_context_sd / setting.moments.resident_context / 2


class Iteration(NamedTuple):
    """Work of a copy."""

    start_s: float
    end_s: float


@pytest.fixture
def iterations(monkeypatch: pytest.MonkeyPatch) -> list[Iteration]:
    """The iterations of all copies, as each is put to work by the replica's discipline."""
    found, serve = list[Iteration](), Lockstep._serve

    def recording(self: Lockstep, now_s: float) -> None:
        serve(self, now_s)
        found.extend(Iteration(now_s, batch.copies[0].free_s) for batch in self._serving)

    monkeypatch.setattr(Lockstep, "_serve", recording)
    return found


def test_copies_iterate_together_and_wait_for_the_longest(iterations: list[Iteration]) -> None:
    problem = problem_of()
    run = simulate(plan_of(sharing(problem)), problem, equal_requests(40, prompt=60, output=20), APART)
    assert run.generated_tokens == 40 * 20
    bars: dict[float, set[float]] = {}
    for each in iterations:
        bars.setdefault(each.start_s, set()).add(each.end_s)
    assert len(bars) > 20
    assert len(iterations) > 2 * len(bars)
    assert all(len(ends) == 1 for ends in bars.values())  # copies that begin together end together
    ends = sorted((start, min(ends)) for start, ends in bars.items())
    assert all(end <= start + 1e-12 for (_, end), (start, _) in itertools.pairwise(ends))  # one at a time


def test_a_gpu_that_fails_takes_all_copies_with_it(iterations: list[Iteration]) -> None:
    problem = problem_of()
    requests = equal_requests(30, prompt=60, output=20)
    faults = (Fault(device="a/2", at_s=0.01, joins=False), Fault(device="a/2", at_s=5.0, joins=True))
    run = simulate(plan_of(sharing(problem)), problem, requests, replace(APART, faults=faults))
    assert run.generated_tokens == 30 * 20
    assert not [each for each in iterations if 0.02 < each.start_s < 5.0]
    assert any(each.start_s > 5.0 for each in iterations)
    assert np.nanmax(run.finished_s) > 5.0


def test_a_replica_that_cannot_iterate_together_is_refused() -> None:
    problem = problem_of()
    plan = plan_of(replace(sharing(problem), in_flight=2))
    with pytest.raises(
        InvalidProblemError, match="replica 0: its copies share experts, it must have one stage with as"
    ):
        simulate(plan, problem, equal_requests(2, prompt=60, output=20), APART)


@pytest.mark.parametrize("roles", [(Role.UNIFIED,), (Role.PREFILL, Role.DECODE)])
def test_a_plan_serves_what_it_says(roles: tuple[Role, ...]) -> None:
    problem = problem_of(nodes=2)
    # Too large for one GPU, six heads that four ranks cannot share, and no pipelines: so the copies share experts.
    model = replace(problem.model, q_heads=6, head_dim=48)
    family = replace(SMALL_FAMILY, tp_sizes=(1, 4), roles=roles, max_pool=0)
    small = {"A": make_profile("A", usable_bytes=14_000_000)}
    shared = replace(problem, model=model, family=family, profiles=small)
    plan = solve_placement(shared)
    assert all(replica.expert_parallel for replica in plan.replicas)
    requests = equal_requests(1200, prompt=60, output=40)
    ends = np.sort(simulate(plan, shared, requests, APART).finished_s)
    first, last = ends[[240, 960]]  # without filling up and running out
    assert 720 / (last - first) == pytest.approx(plan.served_rate(), rel=0.12)


def test_each_gpu_is_sampled_with_its_own_work_and_kv() -> None:
    problem = problem_of()
    chosen = replace(APART, sample_every_s=1e-3)
    run = simulate(plan_of(sharing(problem)), problem, equal_requests(1, prompt=60, output=200), chosen)
    kv, busy = run.series.kv_used_fraction.max(axis=0), run.series.busy_fraction.max(axis=0)
    assert np.count_nonzero(kv) == np.count_nonzero(busy) == 1, "one copy has one request"
    assert np.argmax(kv) == np.argmax(busy)
