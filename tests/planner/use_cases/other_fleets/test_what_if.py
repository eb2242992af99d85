"""``hetis-plan what-if``: two fleets, and errors in options."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.catalogue import find_gpu
from hetis.formats.errors import DocumentError
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.report.what_if import verdict_words
from hetis.planner.use_cases.comparing.compare import Compared
from hetis.planner.use_cases.other_fleets.additions import FleetChange
from hetis.planner.use_cases.other_fleets.what_if import Side, WhatIf, _kind_of_change, changed_inputs
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.precision import for_engine
from hetis.planner.use_cases.sources import LoadedInputs, load_inputs
from hetis.solver.advice import Addition, Change, NodeShape, Proven, difference
from hetis.solver.constraints import WithoutTp
from hetis.solver.engine_rules import EngineRules
from hetis.solver.plan import Objective, ObjectiveKind
from hetis.solver.problem import PlacementProblem
from tests.fleets import fleet
from tests.planner.command_line import invoke

FLEET = fleet("small", "2 l4: 1 L4", "t4: 1 T4")


@pytest.fixture
def fleet(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(FLEET)
    return str(path)


def asked(fleet: str, *arguments: str) -> list[str]:
    problem = ["-m", "Llama-2-7B", "-w", "256/64", "--strategy", "hexgen"]
    return ["what-if", "-c", fleet, *problem, *arguments]


def answer_to(fleet: str, *arguments: str) -> dict[str, object]:
    result = invoke(*asked(fleet, *arguments), "-q", "-o", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def value_of(fleet: str) -> float:
    result = invoke("place", *asked(fleet)[1:], "--no-verify", "-q", "-o", "json")
    assert result.exit_code == 0, result.output
    return float(json.loads(result.stdout)["result"]["value"])


def test_those_who_wait_hear_which_of_how_many_is_solved(fleet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetis.planner.cli.searching.PLAIN_INTERVAL_S", 0.0)
    told = invoke(*asked(fleet, "--add", "1xL4")).stderr
    assert "1 of 2, before: " in told
    assert "2 of 2, after: " in told


def test_the_difference_is_that_of_two_solves(fleet: str, tmp_path: Path) -> None:
    answer = answer_to(fleet, "--add", "2xL4", "--remove", "t4", "--gpus-per-node", "1")
    after = tmp_path / "after.yaml"
    after.write_text(
        FLEET.replace("count: 2,", "count: 4,").replace("  - {name: t4, gpus: [{type: T4, count: 1}]}\n", "")
    )
    gain = value_of(str(after)) - value_of(fleet)
    assert answer["difference"]["found"] == pytest.approx(gain)  # type: ignore[index]
    assert answer["difference"]["low"] <= gain <= answer["difference"]["high"] + 1e-9  # type: ignore[index]
    assert answer["difference"]["verdict"] == "better"  # type: ignore[index]
    assert answer["after"]["gpus"] == 4  # type: ignore[index]
    assert answer["node_shape"]["gpus_per_node"] == 1  # type: ignore[index]
    assert sum(answer["plan_change"]["counts"].values()) > 0  # type: ignore[index]


def test_the_tables_fit_80_columns_and_say_what_is_proven(fleet: str) -> None:
    changed = invoke(*asked(fleet, "--remove", "l4-1"), "-q")
    assert changed.exit_code == 0, changed.output
    assert "proven: worse" in changed.output
    grown = invoke(*asked(fleet, "--add", "2xL4"), "-q")
    assert grown.exit_code == 0, grown.output
    assert "in nodes of up to 8 GPUs, zone default" in grown.output
    for shown in (changed.output, grown.output):
        assert "these plans are not simulated. `place` shows the rate that simulated traffic" in " ".join(shown.split())
    assert all(len(line) <= 80 for line in (changed.output + grown.output).splitlines())


def test_a_difference_that_is_proven_to_be_none_is_said_to_be_proven(fleet: str) -> None:
    answer = invoke(*asked(fleet, "--objective", "gpus", "--rate", "0.1", "--add", "1xL4"), "-q")
    assert "proven: there is none" in answer.output


def test_two_fleets_without_a_plan_say_why(fleet: str) -> None:
    result = invoke(*asked(fleet, "--remove", "l4", "--ttft", "1ms"), "-q", "-o", "json")
    assert result.exit_code == ExitCode.INFEASIBLE
    answer = json.loads(result.stdout)
    assert answer["before"]["status"] == answer["after"]["status"] == "infeasible"
    assert answer["after"]["reasons"]


def test_a_fleet_that_loses_all_room_loses_all_its_rate(fleet: str) -> None:
    answer = answer_to(fleet, "--remove", "l4", "--remove", "t4", "--add", "1xRTX-2080Ti")
    assert answer["after"]["status"] == "infeasible"  # type: ignore[index]
    before = answer["before"]["result"]["value"]  # type: ignore[index]
    assert answer["difference"]["high"] == pytest.approx(-before)  # type: ignore[index]


COST = ("--objective", "cost", "--rate")


@pytest.mark.parametrize(
    ("arguments", "code", "verdict", "words"),
    [
        (["5", "--remove", "l4"], 0, "worse", "proven: worse, no plan exists after"),
        (["1000", "--add", "1xL4"], ExitCode.INFEASIBLE, "same", "proven: no plan exists either way"),
    ],
)
def test_a_cost_without_a_plan_is_no_number(
    fleet: str, arguments: list[str], code: int, verdict: str, words: str
) -> None:
    shown = invoke(*asked(fleet, *COST, *arguments), "-q")
    assert (shown.exit_code, words in shown.output) == (code, True), shown.output
    found = json.loads(invoke(*asked(fleet, *COST, *arguments), "-q", "-o", "json").stdout)["difference"]
    assert (found["found"], found["verdict"], found["no_plan_after"]) == (None, verdict, True)


NEITHER = Proven(value=math.inf, bound=math.inf)  # proven to have no plan
UNKNOWN = Proven(value=math.inf, bound=0.0)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (NEITHER, UNKNOWN, "no plan exists before, and no plan was found after"),
        (UNKNOWN, UNKNOWN, "no plan was found either way"),
    ],
)
def test_what_was_not_found_is_not_said_to_be_impossible(
    tmp_path: Path, before: Proven, after: Proven, words: str
) -> None:
    loaded, objective = inputs_on(tmp_path, H100S), Objective(kind=ObjectiveKind.COST, demand_rps=1.0)
    outcome = Compared(strategy="hexgen", status="unknown", solve_s=0.0)
    one, other = (Side(loaded=loaded, outcome=outcome, proven=proven, usd_per_hour=None) for proven in (before, after))
    found = WhatIf(
        objective=objective, change=FleetChange(shape=NodeShape(zone="default")), before=one, after=other,
        difference=difference(before, after, maximises=False, change=Change.OTHER), plan_change=None,
    )  # fmt: skip
    assert verdict_words(found) == f"undecided: {words}; a longer --time-limit may find a plan"


def test_all_that_is_wrong_is_told_at_once(fleet: str) -> None:
    with pytest.raises(DocumentError) as failure:
        raise_from(asked(fleet, "--add", "2xL5", "--add", "some", "--remove", "l5-0", "--zone", "mars"))
    told = str(failure.value)
    for part in (
        "no zone mars",
        "unknown GPU 'L5'",
        "'some' is not a count and a GPU type such as 4xL4",
        "has no node l5-0, did you mean l4-0?",
    ):
        assert part in told


def raise_from(arguments: list[str]) -> None:
    failure = invoke(*arguments).exception
    assert failure is not None
    raise failure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--add", "1xL4", "--node-like", "l4-9"], "no node l4-9"),
        (["--add", "0xL4"], "must be 1 to"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(
    fleet: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(asked(fleet, *arguments)) == ExitCode.INVALID
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--remove", "l4", "--gpus-per-node", "4"],
        ["--remove", "l4", "--nic", "10Gbps"],
    ],
)
def test_half_a_question_is_refused(fleet: str, arguments: list[str]) -> None:
    assert invoke(*asked(fleet, *arguments)).exit_code == ExitCode.INVALID


def narrows(before: LoadedInputs, **change: Any) -> list[Change]:
    """Return the kind of a change, and that of its reverse."""
    shape = NodeShape(gpus_per_node=1, zone=before.inputs.cluster.zones()[0])
    after = changed_inputs(before, FleetChange(shape=shape, **change))
    settings = PlacementSettings(engine=EngineRules(name="vllm-hetis"))
    old, new = (posed(loaded, settings) for loaded in (before, after))
    return [_kind_of_change(old, new), _kind_of_change(new, old)]


def posed(loaded: LoadedInputs, settings: PlacementSettings) -> PlacementProblem:
    return settings.problem(for_engine(loaded, settings.engine).inputs, Objective())


def inputs_on(folder: Path, nodes: str, network: str = "", model: str = "Llama-3.1-8B") -> LoadedInputs:
    text = f"apiVersion: hetis/v1\nkind: Cluster\nname: small\nnodes:\n{nodes}"
    (folder / "asked.yaml").write_text(f"{text}network: {{bandwidth: 100Gbps, latency: 20us{network}}}\n")
    return load_inputs(cluster=str(folder / "asked.yaml"), model=model, workload="1024/256")


A10 = Addition(gpu=find_gpu("A10").gpu, count=1)
H100S = "  - {name: x, count: 3, gpus: [{type: H100-SXM-80GB, count: 1}]}\n"


def test_more_nodes_keep_all_plans_and_fewer_keep_none_that_is_new(tmp_path: Path) -> None:
    fleet = inputs_on(tmp_path, H100S)
    assert narrows(fleet, add=(A10,)) == [Change.GROWN, Change.SHRUNK]
    assert narrows(fleet, remove=("x-1",)) == [Change.SHRUNK, Change.GROWN]
    assert narrows(fleet, add=(A10,), remove=("x-1",)) == [Change.OTHER, Change.OTHER]


def test_a_constraint_more_leaves_fewer_plans_and_without_a_problem_nothing_is_known(tmp_path: Path) -> None:
    problem = posed(inputs_on(tmp_path, H100S), PlacementSettings(engine=EngineRules(name="vllm-hetis")))
    constrained = replace(problem, constraints=(*problem.constraints, WithoutTp(tp=2)))
    assert _kind_of_change(problem, constrained) is Change.SHRUNK
    assert _kind_of_change(constrained, problem) is Change.GROWN
    assert _kind_of_change(None, problem) is _kind_of_change(problem, None) is Change.OTHER


def test_a_fleet_that_lost_a_type_has_no_profile_of_it_and_no_origin(tmp_path: Path) -> None:
    before = inputs_on(tmp_path, f"{H100S}  - {{name: y, gpus: [{{type: L4}}]}}\n")
    assert before.origins["profiles"].keys() == before.inputs.profiles.keys() == {"H100-SXM-80GB", "L4"}
    shape = NodeShape(gpus_per_node=1, zone=before.inputs.cluster.zones()[0])
    after = changed_inputs(before, FleetChange(shape=shape, add=(A10,), remove=("y",)))
    assert after.origins["profiles"].keys() == after.inputs.profiles.keys() == {"H100-SXM-80GB", "A10"}


def test_types_on_which_the_engine_does_not_run_change_nothing(tmp_path: Path) -> None:
    v100 = Addition(gpu=find_gpu("V100-SXM2-16GB").gpu, count=1)
    assert narrows(inputs_on(tmp_path, H100S), add=(v100,)) == [Change.GROWN, Change.SHRUNK]


def test_links_between_nodes_narrow_nothing(tmp_path: Path) -> None:
    """Sets of nodes inside which KV is charged a link depend on all nodes, though the slow one costs nothing here."""
    links = ", nodes: {links: [{between: [x-0, x-2], bandwidth: 100Mbps, latency: 20ms}]}"
    assert narrows(inputs_on(tmp_path, H100S, links), remove=("x-2",)) == [Change.OTHER, Change.OTHER]
    fleet = str(tmp_path / "asked.yaml")
    question = ["what-if", "-c", fleet, "-m", "Llama-3.1-8B", "-w", "1024/256", "--remove", "x-2", "--ttft", "none"]
    found = invoke(*question, "--tpot", "none", "--roles", "prefill,decode", "-q", "-o", "json")
    difference = json.loads(found.stdout)["difference"]
    assert difference["low"] <= difference["found"] <= 0.0 <= difference["high"]


def test_a_kind_of_gpus_that_makes_pipelines_shorter_narrows_nothing(tmp_path: Path) -> None:
    nodes = "".join(
        f"  - {{name: n{i}, nic: {{bandwidth: {100 + i}Gbps, latency: 20us}}, gpus: [{{type: L4, count: 1}}]}}\n"
        for i in range(13)
    )
    fleet = inputs_on(tmp_path, nodes, model="Llama-3.1-70B")
    assert narrows(fleet, add=(A10,)) == [Change.OTHER, Change.OTHER], "8 stages before, 7 after"
    assert narrows(fleet, remove=("n3",)) == [Change.SHRUNK, Change.GROWN], "8 stages in both"
