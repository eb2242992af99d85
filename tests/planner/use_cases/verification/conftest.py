"""Llama-2-7B on two A100, verified once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.planner.use_cases.saved_plans import load_plan_and_problem
from hetis.planner.use_cases.simulation.simulate import default_rate
from hetis.planner.use_cases.verification.rates import simulated_at
from hetis.planner.use_cases.verification.tried_rate import TriedRate
from hetis.simulator.metrics import Summary
from hetis.simulator.running import silent
from hetis.solver.budget import Budget
from hetis.solver.plan import Objective
from tests.planner.command_line import invoke
from tests.planner.use_cases.simulation.test_simulate import CLUSTER, summed
from tests.planner.use_cases.verification.verifying import Placed


@pytest.fixture(scope="session")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-2-7B on two A100, verified."""
    folder = tmp_path_factory.mktemp("placed")
    (folder / "cluster.yaml").write_text(CLUSTER)
    out = folder / "plan.json"
    with summed():
        done = invoke(
            "place", "-c", str(folder / "cluster.yaml"), "-m", "Llama-2-7B", "-w", "500/100", "--out", str(out)
        )
    assert done.exit_code == 0, done.output
    assert "Simulated" in done.stdout
    assert "Uniform" in done.stdout
    return out


@pytest.fixture(scope="session")
def pair(placed: Path) -> Placed:
    with summed():
        found = load_plan_and_problem(str(placed))
    return found.plan, found.problem


@pytest.fixture(scope="session")
def run(pair: Placed) -> TriedRate:
    """The plan at its rate."""
    limits = pair[0].objective
    with summed():
        found = simulated_at(*pair, default_rate(*pair), limits, seed=0, budget=Budget(), report=silent)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def one_run(pair: Placed) -> Summary:
    limits = Objective(ttft_limit_s=None, tpot_limit_s=None)
    with summed():
        found = simulated_at(*pair, 1.0, limits, seed=0, budget=Budget(), report=silent)
    return found.summary
