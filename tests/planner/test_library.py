"""``import hetis``: its names, their creation on first use, and their agreement with the commands."""

from __future__ import annotations

import ast
import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from pathlib import Path
from shutil import copy
from typing import Any

import grpc
import numpy as np
import pytest

import hetis
from hetis.formats.errors import single_problem
from hetis.planner.client import CallError
from hetis.planner.export.replicas import NotExportableError
from hetis.planner.use_cases.place import PosedPlacement
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.request import PlacementRequest
from hetis.solver.plan import ObjectiveKind
from tests.fleets import fleet
from tests.planner.command_line import EXAMPLES, hetis_plan_here
from tests.planner.html_pages import ReadPage

NAMES = [
    "Client", "Export", "HetisError", "InfeasibleError", "NoPlanFoundError", "Plan", "Simulation", "__version__",
    "load_cluster", "load_plan", "place",
]  # fmt: skip
CLUSTER = fleet("two", "a100: 2 A100-PCIe-80GB")
# Nothing that may be missing from an installation, and nothing that takes time.
BARE_PROGRAM = """
import sys
for name in ("numpy", "pydantic", "yaml", "grpc", "google.protobuf", "highspy", "numba", "rich", "typer"):
    sys.modules[name] = None
import hetis
assert hetis.__version__
assert [name for name in sys.modules if name.startswith("hetis.")] == []
assert set(hetis.__all__) <= set(dir(hetis))
import hetis.solver.errors
assert hetis.HetisError is hetis.solver.errors.HetisError
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library")
    (path / "cluster.yaml").write_text(CLUSTER)
    return path


@pytest.fixture(scope="module")
def plan(folder: Path) -> hetis.Plan:
    """Llama-2-7B on two A100."""
    return hetis.place(folder / "cluster.yaml", "Llama-2-7B", "500/100", tpot="80ms", time_limit="60s")


def test_the_names_are_stable_and_all_there() -> None:
    assert sorted(hetis.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(hetis, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'plaice'"):
        _ = hetis.plaice


def test_importing_hetis_loads_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", BARE_PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_plan_is_that_of_the_command_line(plan: hetis.Plan, folder: Path) -> None:
    arguments = (
        "-c",
        "cluster.yaml",
        "-m",
        "Llama-2-7B",
        "-w",
        "500/100",
        "--tpot",
        "80ms",
        "--time-limit",
        "60s",
    )
    done = hetis_plan_here("place", *arguments, "-q", "-o", "json", cwd=folder)
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads(json.dumps(plan.to_dict())), json.loads(done.stdout)
    for one in (ours, theirs):
        one["result"].pop("solve_s")
        one["inputs"].pop("origins")
    assert ours == theirs


@pytest.mark.parametrize(
    ("given", "search_s", "simulation_s"), [({}, 60.0, 120.0), ({"time_limit": "10s"}, 10.0, 30.0)]
)
def test_a_time_limit_that_is_given_limits_the_simulation_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], search_s: float, simulation_s: float
) -> None:
    asked = list[PlacementRequest]()

    def placed(posed: PosedPlacement, _report: object) -> None:
        asked.append(posed.request)
        raise hetis.NoPlanFoundError("not searched")

    monkeypatch.setattr(PosedPlacement, "place", placed)
    with pytest.raises(hetis.NoPlanFoundError):
        hetis.place(folder / "cluster.yaml", "Llama-2-7B", "500/100", **given)
    [request] = asked
    assert (request.time_limit_s, request.simulation_limit_s) == (search_s, simulation_s)


@pytest.mark.parametrize("rate", [0.5, "50%"])
def test_prefix_hits_let_a_fleet_serve_more(plan: hetis.Plan, folder: Path, rate: float | str) -> None:
    found = hetis.place(
        folder / "cluster.yaml", "Llama-2-7B", "500/100", prefix_hit_rate=rate, tpot="80ms",
        verify=False,
    )  # fmt: skip
    assert found.problem.workload.prefix_hit_rate == 0.5
    assert found.result.value > plan.result.value


def test_inputs_may_be_values(plan: hetis.Plan, folder: Path) -> None:
    problem = plan.problem
    cluster = hetis.load_cluster(folder / "cluster.yaml")
    again = hetis.place(cluster, problem.model, problem.workload, tpot=0.08, time_limit=60, verify=False)
    assert again.result.value == (Verified.of(plan.value).model_value or plan.result.value)
    assert again.value.inputs["origins"]["model"] == "value"


def test_a_plan_shows_itself(plan: hetis.Plan, tmp_path: Path) -> None:
    assert f"{len(plan.replicas)} replica" in repr(plan)
    page = plan.report(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
    shown = plan._repr_html_()
    assert shown.startswith("<iframe ")
    assert shown.count("<") == 2, "the page is text inside the frame"
    assert "Latency limits" in ReadPage(page).text
    assert plan.figures.gpus_used == sum(len(replica.devices()) for replica in plan.replicas)
    assert len(plan.explain().memory) >= 1


def test_a_saved_plan_is_the_same(plan: hetis.Plan, tmp_path: Path) -> None:
    for name in ("plan.json", "plan.yaml"):
        plan.save(tmp_path / name)
        assert hetis.load_plan(tmp_path / name).to_dict() == plan.to_dict()
    altered = json.loads((tmp_path / "plan.json").read_text())
    altered["inputs"]["documents"]["cluster"]["name"] = "another"
    (tmp_path / "plan.json").write_text(json.dumps(altered))
    with pytest.warns(UserWarning, match="plan.json: the inputs saved in the plan differ from those it was made from"):
        hetis.load_plan(tmp_path / "plan.json")


def parameters(function: Callable[..., object]) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_an_export_is_that_of_the_command_line(plan: hetis.Plan, tmp_path: Path) -> None:
    """Library and command give the same files, report all errors in options at once, and never overwrite a folder."""
    plan.save(tmp_path / "plan.json")
    options = ("--model", "/models/x", "--node-address", "a100=10.0.0.1", "--", "--max-model-len", "512")
    done = hetis_plan_here("export", "plan.json", "--to", "vllm", "--out", "theirs", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = plan.export(
        "vllm", tmp_path / "ours", model="/models/x", node_address={"a100": "10.0.0.1"},
        engine_options=["--max-model-len", "512"],
    )  # fmt: skip
    assert files_in(tmp_path / "ours") == files_in(tmp_path / "theirs") == dict(made.files)
    assert (made.lost, made.left) == ((), ())
    (tmp_path / "ours" / "a100" / "r9.sh").touch()
    assert plan.export("vllm", tmp_path / "ours", force=True).left == (str(Path("a100", "r9.sh")),)
    with pytest.raises(hetis.HetisError) as caught:
        plan.export("vllm", tmp_path / "ours", dtype="int3", engine_options=["--tp-size", "2"])
    assert [line.partition(": ")[2] for line in str(caught.value).splitlines()] == [
        f"{tmp_path / 'ours'} is not empty: choose another, or use force=True",
        "--tp-size cannot be passed to the engine: the plan sets it",
        "dtype is 'int3', must be one of auto, bfloat16, float16, float32",
    ]
    with pytest.raises(hetis.HetisError) as caught:
        plan.export("punch-cards", engine="steam", device="tpu")
    assert [line.partition(",")[0] for line in str(caught.value).splitlines()] == [
        "export: target: unknown target 'punch-cards'",
        "export: engine: unknown engine 'steam'",
        "export: device: unknown device 'tpu'",
    ]
    with pytest.raises(hetis.HetisError) as caught:
        plan.export("vllm", 3, port="80", node_address=["a100=10.0.0.1"], model=None)  # type: ignore[arg-type]
    assert str(caught.value).splitlines() == [
        "export: folder: is 3, must be a path",
        "export: model: is None, must be text",
        "export: port: is '80', must be a whole number",
        "export: node_address: is ['a100=10.0.0.1'], must be a mapping",
    ]


def files_in(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_simulation_is_that_of_the_command_line(plan: hetis.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    done = hetis_plan_here("simulate", "plan.json", "--requests", "100", "--threads", "1", "-o", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = plan.simulate(requests=100)
    printed = json.loads(done.stdout)
    assert {name: found.to_dict()[name] for name in ("load", "summary")} == {
        name: printed[name] for name in ("load", "summary")
    }
    assert "requests/s" in repr(found)
    assert found.goodput_rps is None
    assert repr(plan.simulate(requests=1)).startswith("<hetis.Simulation: too short for a rate, TTFT p95 ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "fame"}, "unknown objective 'fame', expected one of goodput"),
        ({"strategy": "hope"}, "unknown strategy 'hope'"),
        ({"tpot": "soon"}, "soon"),
        ({"time_limit": -1}, "must be > 0"),
        ({"objective": "cost"}, "needs a demanded rate: rate"),
        ({"attainment": 0.9, "verify": False}, "^attainment can only be checked in .*, which verify=False skips"),
        ({"ttft_statistic": "p99", "ttft": None}, r"^ttft_statistic is given, but TTFT has no limit \(ttft\)"),
        ({"max_gpus": 2, "strategy": "hexgen-paper"}, "apply to an engine's plans, not to strategy hexgen-paper"),
        ({"survive": "node"}, "^survive node: the fleet has no other node"),
        ({"roles": ["judge"]}, "judge"),
        ({"cluster": None}, r"cluster: is None, must be a Cluster, or its file$"),
        ({"cluster": 3}, "cluster: is 3, must be a Cluster"),
        ({"model": None}, "model: is None, must be a ModelSpec"),
        ({"workload": (1000, 200)}, r"workload: is \(1000, 200\), must be a Workload"),
        ({"objective": "gpus", "rate": float("nan")}, "rate: is nan, must be at least 0.001"),
        ({"objective": "cost", "rate": -1}, "rate: is -1, must be at least 0.001"),
        ({"objective": "cost", "rate": 1e-9}, "rate: is 1e-09, must be at least 0.001"),
        ({"objective": "cost", "rate": "3"}, "rate: is '3', must be a number"),
        ({"gap": float("nan")}, "gap: is nan, must be at least 0 and below 1"),
        ({"gap": -0.1}, "gap: is -0.1, must be at least 0"),
        ({"objective": "cost", "rate": float("inf")}, "rate: is inf, must be finite"),
        ({"mtp": "x"}, "mtp: 'x' is not TOKENS:ACCEPTANCE"),
        ({"seed": -1}, "seed: is -1, must be at least 0"),
        ({"seed": 1.5}, "seed: is 1.5, must be a whole number"),
        ({"simplest_within": 2}, "simplest_within: is 2, must be at least 0 and below 1"),
        ({"ttft": "100"}, "ttft: a TTFT limit of 100 has no unit: 100ms or 100s?"),
        ({"tpot": "50"}, "tpot: a TPOT limit of 50 has no unit: 50ms or 50s?"),
        ({"ttft": True}, "ttft: is True, must be a number or text such as '200ms'"),
        ({"ttft": 10**400}, r"ttft: is 10+\.\.\., which is too large"),
        ({"gap": 10**400}, r"gap: is 10+\.\.\., which is too large"),
        ({"ttft": [1]}, r"ttft: is \[1\], must be a number"),
        ({"pin": [3]}, r"pin\[0\]: is 3, must be text"),
        ({"profiles": 3}, "profiles: is 3, must be a list"),
        ({"weights": 8}, "weights: is 8, must be text"),
        ({"kv": ["fp8"]}, r"kv: is \['fp8'\], must be text"),
        ({"max_stages": 1.5}, "max_stages: is 1.5, must be a whole number"),
        ({"chunk_tokens": 0}, "chunk_tokens: is 0, must be a list"),
        ({"chunk_tokens": [0]}, r"chunk_tokens\[0\]: is 0, must be at least 1"),
        ({"verify": "no"}, "verify: is 'no', must be True or False"),
        ({"progress": 3}, "progress: is 3, must be callable"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(hetis.HetisError, match=words):
        hetis.place(**{"cluster": folder / "cluster.yaml", "model": "Llama-2-7B", "workload": "500/100", **options})


def test_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(hetis.HetisError) as caught:
        hetis.place(None, "Llama-2-7B", "500/100", gap=-1, seed="2")  # type: ignore[arg-type]
    assert str(caught.value).splitlines() == [
        "place: cluster: is None, must be a Cluster, or its file",
        "place: gap: is -1, must be at least 0 and below 1 (100%)",
        "place: seed: is '2', must be a whole number",
    ]
    with pytest.raises(hetis.HetisError, match="load_plan: path: is 3, must be a path"):
        hetis.load_plan(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plaice"):
        hetis.place("cluster.yaml", "Llama-2-7B", "500/100", plaice=1)  # type: ignore[call-arg]


def test_a_simulation_names_its_wrong_arguments(plan: hetis.Plan) -> None:
    with pytest.raises(hetis.HetisError, match="simulate: rate: is nan, must be above 0\nsimulate: seeds: is 0"):
        plan.simulate(rate=float("nan"), seeds=0)


def test_one_constraint_or_role_stands_for_a_list_of_it_and_numbers_may_be_numpys(folder: Path) -> None:
    inputs = (folder / "cluster.yaml", "Llama-2-7B", "500/100")
    make = partial(hetis.place, *inputs, tpot=np.float64(0.08), seed=np.int64(0), verify=False)
    one, several = make(pin="gpus=..1", roles="unified"), make(pin=["gpus=..1"], roles=["unified"])
    assert one.figures.gpus_used == 1
    assert one.replicas == several.replicas


def test_an_impossible_plan_has_its_reasons(folder: Path) -> None:
    with pytest.raises(hetis.InfeasibleError) as caught:
        hetis.place(folder / "cluster.yaml", "Llama-3.1-405B", "500/100", time_limit=5, pin="replicas=2..")
    assert caught.value.reasons
    assert "--" not in f"{caught.value} {caught.value.reasons}"
    assert_is_pickled(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        single_problem("plan.json", "no such file"),
        NotExportableError(("one reason", "another")),
        CallError("too late", code=grpc.StatusCode.ABORTED, reason="ETAG_MISMATCH", metadata={"etag": "v2"}),
    ],
)
def test_errors_come_back_from_other_processes(error: hetis.HetisError) -> None:
    """A pool of processes breaks if the error of a call in it cannot be read."""
    assert_is_pickled(error)


def assert_is_pickled(error: hetis.HetisError) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Runs cell by cell, as a notebook does: the last expression of each cell is its value.

    Only the last simulation runs, with fewer requests; other tests here simulate the plan by `place`.
    """
    copy(EXAMPLES / "h100-l4.yaml", tmp_path)
    notebook = (EXAMPLES / "plan.ipynb").read_text()
    placing = 'time_limit=\\"20s\\")'  # in JSON
    assert placing in notebook
    notebook = notebook.replace(placing, placing.replace(")", ", verify=False)"))
    cells = json.loads(notebook.replace("requests=100", "requests=20"))["cells"]
    shown, names = [], dict[str, Any]()
    with chdir(tmp_path):
        for cell in cells:
            if cell["cell_type"] == "code":
                shown.append(value_of("".join(cell["source"]), names))
    plan = next(value for value in shown if isinstance(value, hetis.Plan))
    assert plan.value.objective.kind is ObjectiveKind.GOODPUT
    assert shown[-1] is True
    assert (tmp_path / "report.html").exists()


def value_of(source: str, names: dict[str, Any]) -> Any:
    *body, last = ast.parse(source).body
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    exec(compile(ast.Module([last], []), "cell", "exec"), names)
    return None


def test_replicas_without_routes_are_left_out_and_other_checkpoints_are_told() -> None:
    plan = hetis.place(
        EXAMPLES / "h100-l4.yaml", "Llama-3.1-70B-Instruct", "8000/300", weights="fp8", ttft=None, tpot="50ms",
        verify=False, time_limit="10s",
    )  # fmt: skip
    assert [replica.role.value for replica in plan.replicas] == ["unified"], "L4s would prefill for nobody"
    [told] = plan.export("vllm").lost
    named = "meta-llama/Meta-Llama-3.1-70B-Instruct"
    assert told.startswith(f"{named} is stored in bf16, but the plan needs weights in fp8")
    served = [text for text in plan.export("vllm").files.values() if "vllm serve" in text]
    assert served
    assert all(named in text for text in served), "what was named is launched"
    assert plan.export("vllm", model="/models/llama-fp8").lost == ()
