"""`place` with a fake solver: output, saved files and exit code for every outcome."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from hetis.formats.documents import load_plan, write_atomically
from hetis.formats.errors import single_problem
from hetis.planner.cli import outputs
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.use_cases import place as placing
from hetis.planner.use_cases.climbing import Climbed
from hetis.planner.use_cases.request import PlacementRequest, objective
from hetis.planner.use_cases.sources import load_inputs
from hetis.solver.budget import silent
from hetis.solver.errors import InfeasibleError, NoPlanFoundError, UncheckedPlanError
from hetis.solver.plan import Objective, ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem
from tests.fleets import fleet
from tests.planner import plans
from tests.planner.command_line import EXAMPLES

PLAN = plans.plan(plans.paper_replica())
INPUTS = ["place", "--no-verify", "-c", str(EXAMPLES / "paper.yaml"), "-m", "Llama-2-70B", "-w", "1024/256"]

Solver = Callable[[Plan | Exception], None]


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Solver:
    """Makes the solver return a plan, or raise an error, without solving."""

    def answer_with(outcome: Plan | Exception) -> None:
        def make_plan(_loaded: object, problem: PlacementProblem, *_: object, **_options: object) -> Climbed:
            if isinstance(outcome, Exception):
                raise outcome
            return Climbed(plan=outcome, problem=problem)

        import_module("hetis.planner.use_cases.comparing.compare")  # imported later, it would keep the replacement
        monkeypatch.setattr(placing, "make_plan", make_plan)

    monkeypatch.delenv("HETIS_DEBUG", raising=False)
    return answer_with


def test_a_plan_is_printed_and_saved(solver: Solver, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver(PLAN)
    assert run([*INPUTS, "-o", "json", "--out", str(tmp_path / "plan.json")]) == ExitCode.OK
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "plan.json").read_text())
    saved = load_plan(tmp_path / "plan.json")
    assert isinstance(saved, Plan)
    assert saved == PLAN
    assert f"saved {tmp_path / 'plan.json'}" in captured.err


@pytest.mark.parametrize(("field", "value"), [("prefix_hit_rate", 0.4), ("burstiness", 2.0), ("burstiness", 0.0)])
def test_the_problem_has_what_was_given_of_the_traffic(field: str, value: float) -> None:
    request = PlacementRequest(cluster=INPUTS[3], model=INPUTS[5], workload=INPUTS[7], **{field: value})
    posed, without = placing.pose(request), placing.pose(replace(request, **{field: None}))
    assert getattr(posed.loaded.inputs.workload, field) == value
    assert getattr(posed.problem.workload, field) == value
    assert posed.loaded.inputs.documents()["workload"][field] == value
    assert field not in without.loaded.inputs.documents()["workload"]


def test_bursts_cost_rate(capsys: pytest.CaptureFixture[str]) -> None:
    values = []
    for burstiness in ("0", "1", "3"):
        assert run([*INPUTS, "--ttft", "500ms", "--burstiness", burstiness, "--no-verify", "-o", "json"]) == ExitCode.OK
        values.append(json.loads(capsys.readouterr().out)["result"]["value"])
    assert values == sorted(values, reverse=True)
    assert values[0] > values[2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("1", "'1' is out of range, must be at least 0% and below 100%, or trace"),
        ("100%", "'100%' is out of range, must be at least 0% and below 100%, or trace"),
        ("-0.1", "'-0.1' "),
        ("much", "'much' "),
        ("trace", "workload 1024/256: has no hash_ids"),
    ],
)
def test_hit_rates_that_are_none_are_refused(given: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*INPUTS, "--prefix-hit-rate", given]) == ExitCode.INVALID
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_three_forms_hold_the_same(solver: Solver, capsys: pytest.CaptureFixture[str]) -> None:
    solver(PLAN)
    run([*INPUTS, "-o", "json"])
    as_json = capsys.readouterr().out
    run([*INPUTS, "-o", "yaml"])
    assert yaml.safe_load(capsys.readouterr().out) == json.loads(as_json)
    run([*INPUTS])
    assert "1.350 requests/s" in capsys.readouterr().out


def test_an_infeasible_problem_is_a_document_with_reasons(solver: Solver, capsys: pytest.CaptureFixture[str]) -> None:
    solver(InfeasibleError(("weights take 140 GB, the fleet has 48 GB", "TTFT is 3 s at least")))
    assert run([*INPUTS, "-o", "json"]) == ExitCode.INFEASIBLE
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["kind"] == "Plan"
    assert document["result"]["status"] == "infeasible"
    assert document["reasons"] == ["weights take 140 GB, the fleet has 48 GB", "TTFT is 3 s at least"]
    assert captured.err.endswith(
        "error: no plan exists\n  - weights take 140 GB, the fleet has 48 GB\n  - TTFT is 3 s at least\n"
    )


def test_an_infeasible_problem_saves_no_file(solver: Solver, tmp_path: Path) -> None:
    solver(InfeasibleError(("no",)))
    assert run([*INPUTS, "--out", str(tmp_path / "plan.json")]) == ExitCode.INFEASIBLE
    assert not list(tmp_path.iterdir())


def test_stopping_without_a_plan_proves_nothing(solver: Solver, capsys: pytest.CaptureFixture[str]) -> None:
    solver(NoPlanFoundError("no plan within 1 s"))
    assert run(INPUTS) == ExitCode.NO_PLAN
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("error: no plan within 1 s\n")


def test_ctrl_c_before_a_plan_is_told_to_people_and_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prove(posed: placing.PosedPlacement, _report: object) -> None:
        posed.cancelled.set()
        raise NoPlanFoundError("no plan within 1 s")

    monkeypatch.setattr(placing.PosedPlacement, "prove", prove)
    assert run([*INPUTS, "-o", "json"]) == ExitCode.INTERRUPTED
    captured = capsys.readouterr()
    assert captured.err.endswith("error: stopped before a plan was found\n")
    assert json.loads(captured.out)["exit_code"] == ExitCode.INTERRUPTED


def test_a_plan_is_shown_before_it_is_simulated(
    solver: Solver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(PLAN)
    shown = list[str]()

    def verify(_posed: object, made: Climbed, _report: object) -> Climbed:
        shown.append(capsys.readouterr().out)
        return made

    monkeypatch.setattr(placing.PosedPlacement, "verify", verify)
    assert run(INPUTS) == ExitCode.OK
    assert "Goodput" in shown[0]
    assert capsys.readouterr().out == ""


def test_a_plan_that_fails_its_check_is_not_shown(
    solver: Solver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(UncheckedPlanError(("replica 0: device a100/9 does not exist",)))
    assert run([*INPUTS, "--out", str(tmp_path / "plan.json")]) == ExitCode.INTERNAL
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "  replica 0: device a100/9 does not exist\n" in captured.err
    assert not list(tmp_path.iterdir())


def test_strict_asks_for_the_gap(solver: Solver, capsys: pytest.CaptureFixture[str]) -> None:
    solver(PLAN)
    assert run([*INPUTS, "--strict", "--gap", "1%"]) == ExitCode.OK
    assert run([*INPUTS, "--strict", "--gap", "0.5%"]) == ExitCode.MISSED
    captured = capsys.readouterr()
    assert "the gap is 0.520%, the target is 0.500%" in captured.err
    assert "1.350 requests/s" in captured.out
    assert run([*INPUTS, "--gap", "0.5%"]) == ExitCode.OK


def test_strict_asks_for_the_demanded_rate(solver: Solver, capsys: pytest.CaptureFixture[str]) -> None:
    solver(replace(PLAN, objective=Objective(demand_rps=2.0)))
    assert run([*INPUTS, "--strict", "--gap", "1%", "--rate", "2"]) == ExitCode.MISSED
    assert "the plan serves 1.35 requests/s, 2 are demanded" in capsys.readouterr().err


def test_a_path_that_cannot_be_written_is_refused_before_the_solve(
    solver: Solver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(RuntimeError("must not be asked"))
    assert run([*INPUTS, "--out", str(tmp_path / "missing" / "plan.json")]) == ExitCode.INVALID
    assert "no folder" in capsys.readouterr().err


def test_a_plan_that_could_not_be_saved_is_still_printed(
    solver: Solver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disk_full(path: Path, _text: str) -> None:
        raise single_problem(str(path), "cannot be written: No space left on device")

    assert outputs.write_atomically is write_atomically
    monkeypatch.setattr(outputs, "write_atomically", disk_full)
    solver(PLAN)
    assert run([*INPUTS, "-o", "json", "--out", str(tmp_path / "plan.json")]) == ExitCode.INTERNAL
    captured = capsys.readouterr()
    assert json.loads(captured.out)["kind"] == "Plan"
    assert "error: the plan was not saved\n" in captured.err
    assert "No space left on device" in captured.err


def test_problems_of_all_inputs_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["place", "-c", "none.yaml", "-m", "Lama-2-70B", "-w", "azure_conv_2032", "--profile", "p.yaml"]
    assert run(arguments) == ExitCode.INVALID
    err = capsys.readouterr().err
    for part in ("4 problems", "none.yaml: no such file", "did you mean", "azure_conv_2023?", "p.yaml: no such file"):
        assert part in err


def test_a_gpu_that_cannot_be_modelled_is_refused_with_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = "{memory: 64GiB, memory_bandwidth: 1.6TB/s, fp16: 320TFLOPS}"
    nodes, network = "[{name: a, gpus: [{type: Own}]}]", "{bandwidth: 100Gbps, latency: 20us}"
    head = "{apiVersion: hetis/v1, kind: Cluster, name: own"
    (tmp_path / "own.yaml").write_text(f"{head}, gpu_types: {{Own: {gpu}}}, nodes: {nodes}, network: {network}}}")
    assert run(["place", "-c", str(tmp_path / "own.yaml"), "-m", "Llama-2-7B", "-w", "500/100"]) == 2
    said = capsys.readouterr().err
    assert "Own: no efficiencies for architecture 'unknown'; known: Ada" in said
    assert "name the most similar of them as its architecture in the cluster file, or measure it" in said


def test_an_architecture_that_is_not_known_is_named_with_its_line_and_the_nearest_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = "memory: 64GiB, memory_bandwidth: 1.6TB/s, fp16: 320TFLOPS"
    (tmp_path / "own.yaml").write_text(
        f"apiVersion: hetis/v1\nkind: Cluster\nname: own\ngpu_types:\n  One: {{{gpu}, architecture: Hoper}}\n"
        f"  Two:\n    {{{gpu}}}\nnodes: [{{name: a, gpus: [{{type: One}}, {{type: Two}}]}}]\n"
        "network: {bandwidth: 100Gbps, latency: 20us}\n"
    )
    assert run(["place", "-c", str(tmp_path / "own.yaml"), "-m", "Llama-2-7B", "-w", "500/100"]) == ExitCode.INVALID
    headline, first, second = capsys.readouterr().err.splitlines()
    assert headline == "error: 2 problems in the input"
    assert first.startswith(
        f"  {tmp_path}/own.yaml:5: gpu_types.One.architecture: One: no efficiencies for architecture"
    )
    assert ", did you mean Hopper?; name the most similar" in first
    assert second.startswith(f"  {tmp_path}/own.yaml:6: gpu_types.Two.architecture: Two: no efficiencies")


@pytest.mark.parametrize(("vendor", "noted"), [("NVIDIA", True), ("Huawei", True), ("AMD", False), ("Acme", False)])
def test_an_architecture_of_another_vendor_is_noted(tmp_path: Path, vendor: str, noted: bool) -> None:
    gpu = f"{{memory: 64GiB, memory_bandwidth: 1.6TB/s, fp16: 320TFLOPS, architecture: CDNA3, vendor: {vendor}}}"
    nodes, network = "[{name: a, gpus: [{type: Own}]}]", "{bandwidth: 100Gbps, latency: 20us}"
    head = "{apiVersion: hetis/v1, kind: Cluster, name: own"
    (tmp_path / "own.yaml").write_text(f"{head}, gpu_types: {{Own: {gpu}}}, nodes: {nodes}, network: {network}}}")
    notes = load_inputs(cluster=str(tmp_path / "own.yaml"), model="Llama-2-7B", workload="500/100").notes
    said = f"Own is said to be of {vendor}, its architecture CDNA3 is AMD's"
    assert [note.startswith(said) for note in notes] == [True] * noted


def test_a_profile_of_a_gpu_the_cluster_lacks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hetis.formats.catalogue import find_gpu
    from hetis.formats.documents import dump
    from hetis.profiler.roofline import modelled_profile

    (tmp_path / "l4.yaml").write_text(dump(modelled_profile(find_gpu("L4").gpu)))
    assert run([*INPUTS, "--profile", str(tmp_path / "l4.yaml")]) == ExitCode.INVALID
    assert "l4.yaml: gpu: L4 is not in cluster paper" in capsys.readouterr().err


def test_a_second_profile_of_a_gpu_type_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last one would be used without a word."""
    from hetis.formats.catalogue import find_gpu
    from hetis.formats.documents import dump
    from hetis.profiler.roofline import modelled_profile

    one, two = str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")
    for path in (one, two):
        Path(path).write_text(dump(modelled_profile(find_gpu("P100-PCIe-12GB").gpu)))
    assert run([*INPUTS, "--profile", one, "--profile", two]) == ExitCode.INVALID
    said = capsys.readouterr().err
    assert f"two.yaml: gpu: is a second profile of P100-PCIe-12GB, the first is {one}: give only one" in said


def test_a_rate_below_what_a_search_can_tell_from_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*INPUTS, "--objective", "cost", "--rate", "1e-9"]) == ExitCode.INVALID
    assert "'1e-9' is too low, must be at least 0.001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "ttft_s", "tpot_s", "limits"),
    [
        (ObjectiveKind.GOODPUT, None, None, (2.0, 0.1)),
        (ObjectiveKind.COST, None, None, (2.0, 0.1)),
        (ObjectiveKind.THROUGHPUT, None, None, (None, None)),
        (ObjectiveKind.THROUGHPUT, None, 0.05, (None, 0.05)),
        (ObjectiveKind.GOODPUT, float("inf"), None, (None, 0.1)),
        (ObjectiveKind.GOODPUT, 1.0, float("inf"), (1.0, None)),
    ],
)
def test_limits_have_defaults_that_none_lifts(
    kind: ObjectiveKind, ttft_s: float | None, tpot_s: float | None, limits: tuple[float | None, float | None]
) -> None:
    goal = objective(kind, ttft_s=ttft_s, tpot_s=tpot_s, demand_rps=None)
    assert (goal.ttft_limit_s, goal.tpot_limit_s) == limits


TYPES = "{type: RTX-3090, count: 4}, {type: RTX-4090, count: 2}"
HOME = """\
apiVersion: hetis/v1
kind: Cluster
name: home
nodes: [{name: home, gpus: [{type: RTX-3090, count: 4}, {type: RTX-4090, count: 2}]}]
network: {bandwidth: 10Gbps, latency: 50us}
"""


def test_no_limit_is_missed_because_the_fastest_replicas_leave_no_time_to_wait(tmp_path: Path) -> None:
    """A defect in the past: 'no plan exists', although one keeps a tighter limit; and a plan below its demand."""
    path = tmp_path / "home.yaml"
    path.write_text(HOME, encoding="utf-8")
    asked = PlacementRequest(cluster=str(path), model="Llama-3.3-70B", workload="2000/300", weights="awq-int4")
    kept = placing.pose(asked).prove(silent).plan.result.value
    assert kept >= placing.pose(replace(asked, tpot="60ms")).prove(silent).plan.result.value
    demanding = replace(asked, objective="gpus", rate=0.1)
    assert placing.pose(demanding).prove(silent).plan.result.value < 6
    with pytest.raises(NoPlanFoundError, match="wait in each of them"):  # which no bound excludes
        placing.pose(replace(demanding, rate=1.5 * kept)).prove(silent)


def test_what_is_kept_by_prefill_replicas_of_a_lower_load_is_also_found_at_least_cost(tmp_path: Path) -> None:
    """A defect in the past: no plan for half of the demand that a plan keeps."""
    path = tmp_path / "t4.yaml"
    path.write_text(HOME.replace("RTX-3090, count: 4}, {type: RTX-4090, count: 2}", "T4, count: 8}"), encoding="utf-8")
    asked = PlacementRequest(
        cluster=str(path), model="Llama-3.1-70B", workload="azure_conv_2023", weights="awq-int4", ttft="4s", tpot="50ms"
    )
    kept = placing.pose(asked).prove(silent).plan.result.value
    least = placing.pose(replace(asked, objective="gpus", rate=0.9 * kept)).prove(silent).plan
    assert least.planned_rate() >= 0.9 * kept


P100_AND_A40 = """\
apiVersion: hetis/v1
kind: Cluster
name: mixed
nodes:
  - {name: p100, count: 2, gpus: [{type: P100-PCIe-16GB, count: 8}]}
  - {name: a40, count: 4, gpus: [{type: A40, count: 2}]}
network: {bandwidth: 25Gbps, latency: 20us}
"""


def test_a_looser_limit_on_tpot_keeps_no_less(tmp_path: Path) -> None:
    """A defect in the past: batches that fill the limit on TPOT make prompts wait, and kept half of smaller ones."""
    path = tmp_path / "fleet.yaml"
    path.write_text(P100_AND_A40, encoding="utf-8")
    asked = PlacementRequest(
        cluster=str(path), model="Llama-3.1-8B", workload="8000/300", weights="awq-int4", ttft="1s", rung="pipelines"
    )
    tight, loose = (
        placing.pose(replace(asked, tpot=tpot)).prove(silent).plan.result.value for tpot in ("60ms", "100ms")
    )
    assert loose >= tight


def test_a_prompt_needs_room_beside_the_requests_that_decode(tmp_path: Path) -> None:
    """A defect in the past: a second request was counted on where KV has room for one, and all of its prompts waited.

    With few seats many requests wait (Erlang C), most of them for far longer than the limit: little more than a
    twentieth may. The rung above, which keeps several times as much, is the default though it survives no loss.
    """
    path = tmp_path / "fleet.yaml"
    path.write_text(HOME.replace("home,", "h100, count: 2,").replace(TYPES, "{type: H100-SXM-80GB, count: 2}"))
    asked = PlacementRequest(cluster=str(path), model="Llama-3.3-70B", workload="16000/1000", ttft="4s", rung="node")
    plan = placing.pose(asked).prove(silent).plan
    assert all(one.planned_seats == one.seats for one in plan.replicas)
    seats = sum(one.planned_seats for one in plan.replicas)
    busy = plan.result.value * 1000 * plan.replicas[0].tpot_s
    full = busy**seats / math.factorial(seats) / (1 - busy / seats)
    assert full / (full + sum(busy**k / math.factorial(k) for k in range(seats))) < 0.07
    assert placing.pose(replace(asked, rung=None)).prove(silent).plan.result.value > 4 * plan.result.value


def test_search_and_checker_agree_on_waits_where_most_seats_are_taken(tmp_path: Path) -> None:
    """A defect in the past: between the numbers of requests that each knows, rates differ by 0.6%, waits by 5.2%."""
    path = tmp_path / "fleet.yaml"
    nodes, network = ("3 old: 4 RTX-2080Ti", "new: 1 RTX-4090"), "{bandwidth: 10Gbps, latency: 5us}"
    path.write_text(fleet("f", *nodes, network=network))
    asked = PlacementRequest(str(path), "CodeLlama-34b-Instruct-hf", "1000/1000", ttft="4s", tpot="200ms")
    assert placing.pose(asked).prove(silent).plan.result.value > 0.2
