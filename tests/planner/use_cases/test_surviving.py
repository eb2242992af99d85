"""`place --survive node`: the demand is served without any one node; every plan states what remains."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from tests.fleets import fleet

FLEET = fleet("small", "6 l4: 1 L4")


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "fleet.yaml").write_text(FLEET)
    monkeypatch.chdir(tmp_path)
    return [
        "place",
        "-c",
        "fleet.yaml",
        "-m",
        "Llama-2-7B",
        "-w",
        "1024/256",
        "-q",
        "--no-verify",
    ]


def placed(capsys: pytest.CaptureFixture[str], options: list[str]) -> dict[str, Any]:
    assert run([*options, "-o", "json"]) == ExitCode.OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_demand_is_served_without_any_one_node(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    goal = ["--objective", "gpus", "--rate", "0.5", "--tpot", "none", "--ttft", "none"]
    alone, kept = placed(capsys, [*inputs, *goal]), placed(capsys, [*inputs, *goal, "--survive", "node"])
    assert alone["result"]["utilisation"] * alone["inputs"]["losses"]["node"]["rate"] < 0.5
    assert kept["result"]["utilisation"] * kept["inputs"]["losses"]["node"]["rate"] >= 0.5
    assert kept["result"]["value"] > alone["result"]["value"]
    assert any("are left when any one node is lost, of 0.5 that are demanded" in note for note in kept["notes"])
    assert kept["objective"]["demand_rps"] == 0.5
    assert "equal_stages_value" in alone["inputs"]
    assert "equal_stages_value" not in kept["inputs"], "equal stages that do not survive are no comparison"
    Path("plan.json").write_text(json.dumps(kept))
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK
    assert run([*inputs, *goal, "--survive", "node", "--keep", "50%"]) == ExitCode.INVALID
    assert "--keep needs a rate to maximise" in " ".join(capsys.readouterr().err.split())
    assert run([*inputs, "--keep", "50%"]) == ExitCode.INVALID
    assert "--keep needs --survive node or --survive zone" in " ".join(capsys.readouterr().err.split())


def test_most_is_left_after_the_loss_of_any_node(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Six single-GPU replicas on six nodes leave five of six, whatever else might serve more."""
    goal = ["--tpot", "none", "--ttft", "none"]
    plan = placed(capsys, [*inputs, *goal, "--survive", "node"])
    left, whole = plan["result"]["utilisation"] * plan["inputs"]["losses"]["node"]["rate"], plan["result"]["value"]
    assert plan["inputs"]["survives_rps"] == pytest.approx(left)
    assert plan["inputs"]["survives_bound_rps"] == pytest.approx(left, rel=1e-3)
    assert left == pytest.approx(whole * 5 / 6)
    Path("plan.json").write_text(json.dumps(plan))
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK
    for change in (
        {"survives_rps": left * 1.01},
        {"losses": {"node": plan["inputs"]["losses"]["node"] | {"rate": whole}}},
    ):
        Path("wrong.json").write_text(json.dumps(plan | {"inputs": plan["inputs"] | change}))
        assert run(["check", "wrong.json", "-q"]) == ExitCode.INVALID


def test_a_share_of_the_rate_is_kept(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("fleet.yaml").write_text(
        FLEET.replace(
            "  - {name: l4, count: 6, gpus: [{type: L4, count: 1}]}",
            "  - {name: h, count: 1, gpus: [{type: H100-SXM-80GB, count: 4}]}\n"
            "  - {name: l, count: 6, gpus: [{type: L4, count: 1}]}",
        )
    )
    goal = ["--tpot", "none", "--ttft", "none", "--survive", "node"]
    kept = placed(capsys, [*inputs, *goal, "--keep", "60%"])
    lost = kept["inputs"]["losses"]["node"]
    assert lost["rate"] >= 0.6 * lost["whole"] * (1 - 1e-6)
    assert kept["result"]["bound"] == pytest.approx(kept["result"]["value"], rel=1e-3)
    Path("plan.json").write_text(json.dumps(kept))
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK


def test_what_survives_is_spread_over_nodes_where_that_takes_less(
    inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("fleet.yaml").write_text(
        FLEET.replace("count: 6, gpus: [{type: L4, count: 1}]", "count: 2, gpus: [{type: L4, count: 8}]")
    )
    goal = ["--objective", "gpus", "--rate", "1", "--tpot", "none", "--ttft", "none"]
    alone, kept = placed(capsys, [*inputs, *goal]), placed(capsys, [*inputs, *goal, "--survive", "node"])
    assert kept["result"]["value"] == 2 * alone["result"]["value"], "as much on either node"
    assert kept["result"]["bound"] == kept["result"]["value"], "on two nodes, what survives serves twice the demand"
    assert kept["result"]["status"] == "optimal"
    assert kept["result"]["utilisation"] * kept["inputs"]["losses"]["node"]["rate"] >= 1
    Path("plan.json").write_text(json.dumps(kept))
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK


def test_a_demand_that_is_too_large_proves_nothing_of_smaller_ones(
    inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan for the demand alone has one replica on all nodes, whose loss the other GPUs cannot make up for."""
    Path("fleet.yaml").write_text(
        FLEET.replace(
            "  - {name: l4, count: 6, gpus: [{type: L4, count: 1}]}",
            "  - {name: h, count: 2, gpus: [{type: H100-SXM-80GB, count: 2}]}\n"
            "  - {name: l, count: 2, gpus: [{type: L40S, count: 4}]}\n"
            "  - {name: a, gpus: [{type: A100-SXM-80GB, count: 4}]}",
        )
    )
    larger = {"Llama-2-7B": "Llama-3.1-70B", "1024/256": "2000/300"}
    asked = [*(larger.get(one, one) for one in inputs), "--objective", "cost", "--survive", "node"]
    kept = placed(capsys, [*asked, "--rate", "2.5"])
    assert kept["result"]["utilisation"] * kept["inputs"]["losses"]["node"]["rate"] >= 2.5


def test_a_fleet_of_one_node_survives_no_loss(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("fleet.yaml").write_text(FLEET.replace("count: 6", "count: 1"))
    assert run([*inputs, "--objective", "gpus", "--rate", "0.1", "--survive", "node"]) == ExitCode.INFEASIBLE
    assert "--survive node: the fleet has no other node" in capsys.readouterr().err


@pytest.mark.parametrize("constraint", [[], ["--pin", "node=big:as=primary"]])
def test_what_can_be_left_at_most_is_said_of_a_demand_that_cannot(
    inputs: list[str], capsys: pytest.CaptureFixture[str], constraint: list[str]
) -> None:
    big = "  - {name: big, gpus: [{type: H100-SXM-80GB, count: 4}]}\nnetwork"
    Path("fleet.yaml").write_text(FLEET.replace("count: 6", "count: 2").replace("network", big))
    goal = ["--objective", "gpus", "--rate", "8", "--survive", "node", *constraint]
    assert run([*inputs, *goal]) == ExitCode.INFEASIBLE
    said = " ".join(capsys.readouterr().err.split())
    assert "--survive node: no plan serves 8 requests/s without its worst node" in said
    assert re.search(r"([0-9.]+) can be left after the loss of any one, and at most \1", said)


def test_every_plan_says_what_is_served_without_its_worst_node(
    inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*inputs, "--engine", "vllm", "--max-gpus", "1", "--html", "plan.html"]) == ExitCode.OK
    text = " ".join(capsys.readouterr().out.split())
    assert "after losing any one node: at least 83% still served (worst: l4-" in text, text[:900]
    page = " ".join(re.sub("<[^>]*>", " ", Path("plan.html").read_text()).split())
    assert "After losing any one node 83% at least still served worst: l4-" in page


def test_nothing_is_served_without_the_only_node(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("fleet.yaml").write_text(FLEET.replace("count: 6", "count: 1"))
    assert run(inputs) == ExitCode.OK
    text = " ".join(capsys.readouterr().out.split())
    assert "Losses after losing any one node: nothing still served (worst: l4-0)" in text, text[:900]


def test_the_simplest_plan_is_asked_for_with_a_share(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = placed(capsys, [*inputs, "--simplest-within", "2%"])
    assert plan["inputs"]["simplest_within"] == 0.02
    assert any("of the best" in note for note in plan["notes"])
    assert run([*inputs, "--simplest-within", "2%", "--strategy", "splitwise"]) == ExitCode.INVALID
    assert "only searched for by strategies hetis, hexgen and hexgen2" in " ".join(capsys.readouterr().err.split())


ZONES = """\
apiVersion: hetis/v1
kind: Cluster
name: zones
nodes:
  - {name: a, zone: east, count: 4, gpus: [{type: L4, count: 1, usd_per_hour: 0.7}]}
  - {name: b, zone: west, count: 3, gpus: [{type: L4, count: 1, usd_per_hour: 0.8}]}
  - {name: c, zone: north, count: 3, gpus: [{type: A100-SXM-80GB, count: 1, usd_per_hour: 2.5}]}
network: {bandwidth: 100Gbps, latency: 20us}
"""
FREE = """\
apiVersion: hetis/v1
kind: Cluster
name: free
nodes:
  - {name: a, zone: east, count: 3, gpus: [{type: A100-SXM-80GB, count: 1, usd_per_hour: 0}]}
  - {name: l, zone: west, count: 4, gpus: [{type: L4, count: 1, usd_per_hour: 0.7}]}
network: {bandwidth: 100Gbps, latency: 20us}
"""
ONE_GPU = ["--engine", "vllm", "--roles", "unified", "--max-gpus", "1", "--tpot", "none", "--ttft", "none"]
PRICES = {"east": 0.7, "west": 0.8, "north": 2.5}


def cheapest(rates: dict[str, float], demand: float) -> float:
    """Return the least cost of GPU counts by zone that serve the demand without any one zone, by trying all counts."""
    sizes = {"east": 4, "west": 3, "north": 3}
    found = []
    for counts in itertools.product(*(range(size + 1) for size in sizes.values())):
        by_zone = [count * rates[zone] for zone, count in zip(sizes, counts, strict=True)]
        if sum(by_zone) - max(by_zone) >= demand:
            found.append(sum(count * PRICES[zone] for zone, count in zip(sizes, counts, strict=True)))
    return min(found)


@pytest.mark.parametrize("demand", [0.4, 0.9, 1.7, 2.6])
def test_the_demand_is_served_without_any_one_zone(
    inputs: list[str], capsys: pytest.CaptureFixture[str], demand: float
) -> None:
    Path("fleet.yaml").write_text(ZONES)
    rates = {}
    for zone in PRICES:
        others = [f"--forbid=zone={other}" for other in PRICES if other != zone]
        goal = ["--objective", "cost", "--rate", "0.1"]
        rates[zone] = 0.9 * placed(capsys, [*inputs, *ONE_GPU, *goal, *others])["replicas"][0]["rate"]
    plan = placed(
        capsys, [*inputs, *ONE_GPU, "--objective", "cost", "--rate", str(demand), "--survive", "zone"]
    )  # fmt: skip
    assert plan["result"]["utilisation"] * plan["inputs"]["losses"]["zone"]["rate"] >= demand * (1 - 1e-9)
    best = cheapest(rates, demand)
    assert plan["result"]["bound"] <= best * (1 + 1e-9) <= plan["result"]["value"] * (1 + 1e-9)
    assert plan["result"]["value"] == pytest.approx(best)
    Path("plan.json").write_text(json.dumps(plan))
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK


@pytest.mark.parametrize(("place", "rate"), [("zone", 0.5), ("node", 4)])
def test_gpus_may_cost_nothing(inputs: list[str], capsys: pytest.CaptureFixture[str], place: str, rate: float) -> None:
    """The plan for the demand alone is free; losing its zone takes GPUs that are not, losing a node does not."""
    Path("fleet.yaml").write_text(FREE)
    asked = [*inputs, *ONE_GPU, "--objective", "cost", "--rate", str(rate), "--survive", place]
    plan = placed(capsys, asked)
    result = plan["result"]
    if place == "node":
        assert (result["value"], result["bound"], result["gap"], result["status"]) == (0.0, 0.0, 0.0, "optimal")
    else:
        assert result["value"] >= 0.7
    Path("plan.json").write_text(json.dumps(plan))
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK


def test_zones_that_cannot_be_lost_are_refused_with_the_reason(
    inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    goal = ["--objective", "gpus", "--rate", "0.5", "--survive", "zone"]
    assert run([*inputs, *goal]) == ExitCode.INVALID
    assert "all GPUs of cluster small are in one zone" in " ".join(capsys.readouterr().err.split())
    Path("fleet.yaml").write_text(ZONES)
    assert run([*inputs, *ONE_GPU, "--objective", "cost", "--rate", "12", "--survive", "zone"]) == ExitCode.INFEASIBLE
    assert "no plan serves 12 requests/s without its worst zone" in " ".join(capsys.readouterr().err.split())
