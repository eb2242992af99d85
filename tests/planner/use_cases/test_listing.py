"""Pipelines of many kinds of GPUs: only as deep as can be listed, which plans say, unless stages were asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.use_cases import listing
from hetis.planner.use_cases.listing import kinds_in_a_zone, stages_to_list
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.request import objective
from hetis.planner.use_cases.sources import engine_rules, load_inputs
from hetis.solver.placement.constrained_problem import apply_constraints
from hetis.solver.placement.replicas.pipelines import shapes_of
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import ObjectiveKind
from hetis.solver.problem import PlacementProblem

NICS = ("25Gbps", "100Gbps", "200Gbps")
TYPES = (
    *("A100-SXM-80GB", "H100-SXM-80GB", "L4", "L40S", "A10", "T4", "H200-SXM-141GB", "A100-PCIe-40GB", "A40"),
    *("RTX-4090", "RTX-A6000", "A30", "L40", "A10G"),
)
FOUR_KINDS = [("a", "A10", "25Gbps"), ("a", "L4", "25Gbps"), ("a", "L4", "100Gbps"), ("b", "T4", "25Gbps")]


def fleet(folder: Path, kinds: Iterable[tuple[str, str, str]], *, per_node: int = 8) -> str:
    """A file of a cluster with a node of each kind: its zone, GPU type and NIC."""
    nodes = [
        f"  - {{name: n{i}, zone: {zone}, nic: {nic}, gpus: [{{type: {gpu}, count: {per_node}}}]}}"
        for i, (zone, gpu, nic) in enumerate(kinds)
    ]
    head = ["apiVersion: hetis/v1", "kind: Cluster", "name: mixed", "network: {bandwidth: 100Gbps, latency: 20us}"]
    path = folder / "fleet.yaml"
    path.write_text("\n".join([*head, "nodes:", *nodes]), encoding="utf-8")
    return str(path)


def posed(cluster: str, *, model: str = "Llama-2-70B", keep_stages: bool = False, **limits: int) -> PlacementProblem:
    inputs = load_inputs(cluster=cluster, model=model, workload="1000/100").inputs
    settings = PlacementSettings(engine=engine_rules("vllm-hetis", "hetis", **limits), keep_stages=keep_stages)
    return settings.problem(inputs, objective(ObjectiveKind.GOODPUT, ttft_s=None, tpot_s=None, demand_rps=None))


@pytest.mark.parametrize(
    ("num_types", "nics", "zones", "stages"),
    [(4, 3, 3, 7), (13, 1, 1, 8), (14, 1, 1, 7), (6, 2, 2, 8), (12, 3, 3, 3)],
)
def test_pipelines_are_as_deep_as_can_be_listed(
    tmp_path: Path, num_types: int, nics: int, zones: int, stages: int
) -> None:
    kinds = [(zone, gpu, nic) for zone in "abc"[:zones] for gpu in TYPES[:num_types] for nic in NICS[:nics]]
    problem = posed(fleet(tmp_path, kinds))
    assert kinds_in_a_zone(problem) == num_types * nics
    assert problem.family.engine.max_stages == stages
    assert problem.family.in_flight == tuple(range(1, stages + 1))
    assert f"at most {stages} stages in one zone" in problem.describe_family()


@pytest.mark.parametrize("per_node", [2, 8])
def test_kinds_of_gpus_are_those_of_the_search(tmp_path: Path, per_node: int) -> None:
    problem = posed(fleet(tmp_path, FOUR_KINDS, per_node=per_node), model="Llama-3.1-8B", max_stages=3)
    shapes = shapes_of(build_cost_tables(apply_constraints(problem)))
    assert kinds_in_a_zone(problem) == max(len(shape.ranks) for shape in shapes) == 3
    assert stages_to_list(problem) == 3


def test_stages_that_were_asked_for_are_kept_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = fleet(tmp_path, [("a", gpu, nic) for gpu in TYPES[:11] for nic in NICS[:3]][:32])
    deep = posed(cluster, keep_stages=True, max_stages=5).family.engine
    assert deep.max_stages == 5, "376,992 pipelines are fewer than the limit"
    command = ["place", "-c", cluster, "-m", "Llama-2-70B", "-w", "1000/100", "--dry-run"]
    assert run([*command, "--max-stages", "6"]) == ExitCode.INVALID
    assert (
        "--max-stages 6: 32 kinds of GPUs in a zone make 2,324,784 pipelines of 6 stages, 400,000 are listed at most: "
        "--max-stages 5 or less"
    ) in " ".join(capsys.readouterr().err.split())
    assert run(command) == ExitCode.OK


def test_a_plan_says_how_deep_its_pipelines_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["place", "-c", fleet(tmp_path, FOUR_KINDS), "-m", "Llama-3.1-8B", "-w", "1000/100", "-q"]
    command += ["--no-verify", "--rung", "workers", "-o", "json"]

    def plan(*options: str) -> dict[str, Any]:
        assert run([*command, *options]) == ExitCode.OK
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    note = "pipelines of up to 2 stages, not 8: 3 kinds of GPUs in a zone; --max-stages allows more"
    assert note not in plan("--time-limit", "5s")["notes"]
    monkeypatch.setattr(listing, "MOST_LISTED", 9)  # 10 pipelines of 3 stages
    short = plan("--time-limit", "5s")
    assert note in short["notes"]
    assert short["inputs"]["engine"]["max_stages"] == 2
    assert "at most 2 stages of" in short["family"]
    (tmp_path / "plan.json").write_text(json.dumps(short))
    assert run(["check", str(tmp_path / "plan.json"), "-q"]) == ExitCode.OK
    capsys.readouterr()
    assert plan("--time-limit", "5s", "--max-stages", "3")["inputs"]["engine"]["max_stages"] == 3
