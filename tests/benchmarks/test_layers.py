"""The queueing model of layers keeps its rules, and agrees with the objective on the better placement."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.layers import ChainQueue, spearman
from examples.layers_fleets import FLEETS, FOLDER, fleet, text
from hetis.formats.documents import load_layers_problem
from hetis.solver.layers import solve
from hetis.solver.layers.plan import LayersPlan
from hetis.solver.layers.problem import LayersProblem, Links, NodeType, TimeTable
from hetis.solver.layers.solve import solve_layers, solve_max_flow

EXAMPLES = Path(__file__).parents[2] / "examples"


def one_node(in_flight: float) -> LayersProblem:
    """Return a node with 10 ms per batch of any size, free prompts, and room for requests of 1 + 2 * 50 tokens."""
    flat = TimeTable(sizes=(1.0, 1000.0), seconds=(0.01, 0.01000001))
    free = TimeTable(sizes=(1.0, 1000.0), seconds=(0.0, 1e-9))
    kind = NodeType(
        name="A", count=1, tokens_per_s=(1e9,), kv_token_layers=(101 * in_flight,), prompt=free, decode=flat
    )
    return LayersProblem(
        name="one",
        num_layers=1,
        node_types=(kind,),
        mean_prompt_tokens=1,
        mean_output_tokens=50,
        links=Links(bandwidth=1e12, latency_s=0.0, activation_bytes=0),
    )


def test_the_queue_fills_kv_room_and_makes_a_token_per_round_trip() -> None:
    problem = one_node(100)
    served = ChainQueue(problem, solve_layers(problem)).run(warm_up_s=10, measured_s=30)
    assert served.in_flight == pytest.approx(100, rel=0.1)
    # A token is generated when its batch ends, and then requests the next one: between one and two batches of 10 ms.
    assert 0.0099 < served.round_trip_s < 0.0201
    assert served.rate_rps == pytest.approx(served.in_flight / (50 * served.round_trip_s), rel=0.05)


def test_the_queue_serves_more_where_the_objective_is_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "STARTS", 2)
    monkeypatch.setattr(solve, "FINAL_MOVES_PER_NODE", 0)
    problem = load_layers_problem(EXAMPLES / "layers-24.yaml")
    found: list[LayersPlan] = []
    for moves in (0, 20, 1000):
        monkeypatch.setattr(solve, "MOVES_PER_NODE", moves)
        found.append(solve_layers(problem))
    found.append(solve_max_flow(problem))
    queued = [ChainQueue(problem, plan).run(warm_up_s=10, measured_s=30).rate_rps for plan in found]
    rates = [plan.rate_rps for plan in found]
    assert spearman(rates, queued) > 0.7
    assert all(0.7 < queue / rate < 1.5 for queue, rate in zip(queued, rates, strict=True))
    assert queued[-1] < 0.8 * queued[2]  # maximum flow does not serve the most


@pytest.mark.parametrize("name", FLEETS)
def test_example_fleets_are_what_their_generator_makes(name: str) -> None:
    assert (FOLDER / f"{name}.yaml").read_text(encoding="utf-8") == text(fleet(name, FLEETS[name]))
