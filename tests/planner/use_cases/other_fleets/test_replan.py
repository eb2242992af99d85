"""``hetis-plan replan`` and ``diff``: from two plan files to the transition between them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hetis.formats.catalogue import find_gpu
from hetis.formats.documents import dump, load_model, to_data
from hetis.formats.models.dtypes import with_precision
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.profiler.roofline import modelled_profile
from hetis.solver.errors import UncheckedPlanError
from tests.fleets import fleet
from tests.planner.command_line import invoke

FLEET = fleet("small", "3 l4: 1 L4", "t4: 2 T4")
PROBLEM = ["-m", "Llama-2-7B", "-w", "256/64", "--strategy", "hexgen"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet, the plan that runs on it, and the same fleet less a node and with one more."""
    folder = tmp_path_factory.mktemp("replan")
    (folder / "fleet.yaml").write_text(FLEET)
    (folder / "less.yaml").write_text(FLEET.replace("count: 3", "count: 2"))
    (folder / "more.yaml").write_text(FLEET.replace("count: 3", "count: 4"))
    only_small = FLEET.replace("type: L4,", "type: RTX-2080Ti,").replace(
        "  - {name: t4, gpus: [{type: T4, count: 2}]}\n", ""
    )
    (folder / "none.yaml").write_text(only_small.replace("count: 3", "count: 1"))
    eight_bits = with_precision(load_model("Llama-2-7B"), weights="fp8")
    (folder / "fp8.yaml").write_text(json.dumps(to_data(eight_bits)))
    run_plan(folder, *PROBLEM)
    return folder


def run_plan(folder: Path, *arguments: str) -> None:
    """Write the plan that runs on the folder's fleet."""
    plan = ["place", "-c", str(folder / "fleet.yaml"), *arguments, "--out", str(folder / "running.json"), "-q"]
    assert run([*plan, "--no-verify"]) == ExitCode.OK


def replanned(folder: Path, cluster: str, *more: str) -> dict[str, object]:
    """Return the answer without a simulation, which takes much longer than the search and has a test of its own."""
    asked = ["replan", "--from", str(folder / "running.json"), "-c", str(folder / cluster), "--no-verify", *more]
    result = invoke(*asked, "-q", "-o", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def without_ttft(replicas: list[dict[str, object]]) -> list[dict[str, object]]:
    """TTFT is stated at a plan's utilisation, which re-planning does not choose."""
    return [{**one, "ttft_s": None} for one in replicas]


def test_a_fleet_that_stays_keeps_its_plan(folder: Path) -> None:
    answer = replanned(folder, "fleet.yaml")
    running = json.loads((folder / "running.json").read_text())
    assert without_ttft(answer["plan"]["replicas"]) == without_ttft(running["replicas"])  # type: ignore[index]
    assert answer["change"]["moved_gpus"] == []  # type: ignore[index]
    assert answer["transition"]["steps"] == []  # type: ignore[index]


@pytest.mark.parametrize("check", ["check_plan", "check_replanning"])
def test_a_plan_or_a_change_that_fails_its_check_is_not_shown(
    folder: Path, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        f"hetis.planner.use_cases.other_fleets.replan.{check}", lambda *_: ["replica 0: device l4/9 does not exist"]
    )
    asked = ["replan", "--from", str(folder / "running.json"), "-c", str(folder / "fleet.yaml"), "--no-verify"]
    result = invoke(*asked, "-q")
    assert isinstance(result.exception, UncheckedPlanError)
    assert result.stdout == ""


def test_replicas_that_stay_run_as_many_requests_at_once_as_before(folder: Path) -> None:
    plan = json.loads((folder / "running.json").read_text())
    for replica in plan["replicas"]:
        replica["max_num_seqs"] = 2 * replica["micro_batch"] * replica["in_flight"]
    (folder / "seats.json").write_text(json.dumps(plan))
    asked = ["replan", "--from", str(folder / "seats.json"), "-c", str(folder / "fleet.yaml"), "--no-verify"]
    answer = json.loads(invoke(*asked, "-q", "-o", "json").stdout)
    assert without_ttft(answer["plan"]["replicas"]) == without_ttft(plan["replicas"])


def test_traffic_may_have_other_prefix_hits_than_before(folder: Path) -> None:
    running = json.loads((folder / "running.json").read_text())
    answer = replanned(folder, "fleet.yaml", "--prefix-hit-rate", "0.5")
    plan = answer["plan"]
    assert plan["inputs"]["documents"]["workload"]["prefix_hit_rate"] == 0.5  # type: ignore[index]
    assert plan["result"]["value"] > running["result"]["value"]  # type: ignore[index]


@pytest.mark.parametrize(("rate", "said"), [("0.1", "0.1000 requests/s"), ("1000", "1,000 requests/s  not met")])
def test_a_demanded_rate_is_shown_with_whether_it_is_met(folder: Path, rate: str, said: str) -> None:
    asked = ["replan", "--from", str(folder / "running.json"), "-c", str(folder / "fleet.yaml"), "--no-verify"]
    lines = invoke(*asked, "-q", "--rate", rate).stdout.splitlines()
    assert [line.removeprefix("Demand").strip() for line in lines if line.startswith("Demand")] == [said]


def test_the_new_plan_is_one_that_every_other_verb_takes(folder: Path) -> None:
    replanned(folder, "less.yaml", "--out", str(folder / "next.json"))
    assert run(["check", str(folder / "next.json"), "-q"]) == ExitCode.OK
    assert run(["explain", str(folder / "next.json"), "-q"]) == ExitCode.OK
    asked = ["replan", "--from", str(folder / "next.json"), "-c", str(folder / "less.yaml"), "--no-verify"]
    steady = invoke(*asked, "-q", "-o", "json")
    assert json.loads(steady.stdout)["change"]["moved_gpus"] == []


def test_what_joins_is_used_and_what_runs_is_left_alone(folder: Path) -> None:
    answer = replanned(folder, "more.yaml")
    counts = answer["change"]["counts"]  # type: ignore[index]
    assert counts["gone"] == 0
    assert answer["change"]["moved_gpus"] == ["l4-3/0"]  # type: ignore[index]
    assert answer["transition"]["lowest"] == answer["transition"]["before"]  # type: ignore[index]
    stay = replanned(folder, "more.yaml", "--max-moves", "0")
    assert stay["change"]["moved_gpus"] == []  # type: ignore[index]


def test_a_gpu_of_another_type_is_another_gpu_whatever_its_name(folder: Path) -> None:
    (folder / "other.yaml").write_text(FLEET.replace("type: L4,", "type: A10,"))
    answer = replanned(folder, "other.yaml")
    moved = [device for device in answer["change"]["moved_gpus"] if device.startswith("l4-")]  # type: ignore[index]
    assert sorted(moved) == ["l4-0/0", "l4-1/0", "l4-2/0"]
    assert set(moved) <= set(answer["change"]["loads"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        (("A10",), "A10.yaml: gpu: A10 is not in cluster small"),
        (("L4", "L4"), "L4.yaml: gpu: is a second profile of L4"),
    ],
)
def test_profiles_that_would_be_ignored_are_refused(
    folder: Path, tmp_path: Path, profiles: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = list[str]()
    for gpu in profiles:
        (tmp_path / f"{gpu}.yaml").write_text(dump(modelled_profile(find_gpu(gpu).gpu)))
        options += ["--profile", str(tmp_path / f"{gpu}.yaml")]
    asked = ["replan", "--from", str(folder / "running.json"), "-c", str(folder / "fleet.yaml"), *options]
    assert run([*asked, "--dry-run"]) == ExitCode.INVALID
    assert said in capsys.readouterr().err


def test_a_profile_that_no_gpu_can_have_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "l4.yaml"
    path.write_text(dump(replace(modelled_profile(find_gpu("L4").gpu), usable_bytes=10**15)))
    asked = ["replan", "--from", str(folder / "running.json"), "-c", str(folder / "fleet.yaml")]
    assert run([*asked, "--profile", str(path), "--dry-run"]) == ExitCode.INVALID
    assert f"{path}: usable_bytes is 1PB, more than the 24GiB of a L4" in capsys.readouterr().err


def test_types_that_join_are_taken_as_the_engine_takes_them(folder: Path) -> None:
    """A10 have the engine's times in the answer. vLLM does not start on V100: they stay idle, as a note states."""
    asked = [*PROBLEM[:4], "--engine", "vllm", "--no-verify", "--out", str(folder / "vllm.json"), "-q"]
    assert run(["place", "-c", str(folder / "fleet.yaml"), *asked]) == ExitCode.OK
    joined = (
        "  - {name: a10, gpus: [{type: A10, count: 1}]}\n  - {name: v100, gpus: [{type: V100-SXM2-16GB, count: 1}]}\n"
    )
    (folder / "joined.yaml").write_text(FLEET.replace("network:", f"{joined}network:"))
    asked = ["replan", "--from", str(folder / "vllm.json"), "-c", str(folder / "joined.yaml"), "--no-verify"]
    found = invoke(*asked, "-q", "-o", "json")
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)["plan"]
    devices = [name for replica in plan["replicas"] for stage in replica["stages"] for name in stage["devices"]]
    assert "v100/0" not in devices
    assert any(note.startswith("V100-SXM2-16GB left out") for note in plan["notes"])
    fits = plan["inputs"]["documents"]["profiles"]["A10"]["fits"]
    assert [fit["provenance"]["origin"][:5] for fit in fits if fit["op"] == "step"] == ["vllm:"]


def test_a_gpu_before_others_of_its_node_is_left_out_too(folder: Path) -> None:
    """Re-planning refused this in the past: without the V100 the L4 had another index."""
    mixed = FLEET.replace(
        "  - {name: t4,",
        "  - {name: m, gpus: [{type: V100-SXM2-16GB, count: 1}, {type: L4, count: 1}]}\n  - {name: t4,",
    )
    (folder / "mixed.yaml").write_text(mixed)
    asked = [*PROBLEM[:4], "--engine", "vllm", "--no-verify", "--out", str(folder / "before.json"), "-q"]
    assert run(["place", "-c", str(folder / "fleet.yaml"), *asked]) == ExitCode.OK
    again = ["replan", "--from", str(folder / "before.json"), "-c", str(folder / "mixed.yaml"), "--no-verify"]
    found = invoke(*again, "-o", "json")
    assert found.exit_code == ExitCode.OK, found.output
    plan = json.loads(found.stdout)["plan"]
    types = {name: s["gpu"] for replica in plan["replicas"] for s in replica["stages"] for name in s["devices"]}
    assert types["m/1"] == "L4"
    assert "V100-SXM2-16GB" not in types.values()


def test_what_was_forbidden_stays_so(folder: Path) -> None:
    """T4 stay idle although present; a pinned number of replicas is dropped, as a warning states."""
    asked = [*PROBLEM, "--forbid", "type=T4", "--pin", "replicas=1..9", "--out", str(folder / "forbidden.json"), "-q"]
    assert run(["place", "-c", str(folder / "fleet.yaml"), "--no-verify", *asked]) == ExitCode.OK
    again = ["replan", "--from", str(folder / "forbidden.json"), "--no-verify", "-o", "json", "-c"]
    found = invoke(*again, str(folder / "more.yaml"))
    assert found.exit_code == 0, found.output
    stages = [stage for replica in json.loads(found.stdout)["plan"]["replicas"] for stage in replica["stages"]]
    assert {stage["gpu"] for stage in stages} == {"L4"}
    assert "re-planning does not support --pin replicas=1..9" in found.stderr
    assert "type=T4" not in found.stderr
    plan = json.loads(found.stdout)["plan"]
    assert "re-planning does not support --pin replicas=1..9" in plan["notes"]
    (folder / "only.yaml").write_text(FLEET.replace("  - {name: t4, gpus: [{type: T4, count: 2}]}\n", ""))
    gone = invoke(*again, str(folder / "only.yaml"))
    assert gone.exit_code == 0, gone.output
    notes = json.loads(gone.stdout)["plan"]["notes"]
    assert "--forbid type=T4 refers to something that the fleet lacks, and is not kept for later" in notes


def test_a_fleet_without_any_gpu_of_the_plan_is_warned_of(folder: Path) -> None:
    (folder / "renamed.yaml").write_text(FLEET.replace("name: l4", "name: other").replace("name: t4", "name: old"))
    asked = ["replan", "--from", str(folder / "running.json"), "--no-verify", "-c"]
    found = invoke(*asked, str(folder / "renamed.yaml"))
    assert found.exit_code == 0, found.output
    assert (
        "GPUs of the running plan, such as l4-0/0, is in cluster small: every replica starts from "
        "scratch" in found.stderr
    )
    assert "of the running plan" not in invoke(*asked, str(folder / "less.yaml")).stderr


def test_a_running_plan_that_fails_its_check_is_warned_of_once_and_replanned(folder: Path) -> None:
    """Here its model has a smaller KV cache than the one that it was made for."""
    plan = json.loads((folder / "running.json").read_text())
    plan["inputs"]["documents"]["model"]["kv_bytes"] = 1.0
    (folder / "unchecked.json").write_text(json.dumps(plan))
    asked = ["replan", "--from", str(folder / "unchecked.json"), "-c", str(folder / "fleet.yaml"), "--no-verify"]
    found = invoke(*asked, "-o", "json")
    assert found.exit_code == ExitCode.OK, found.output
    violations = json.loads(invoke("check", str(folder / "unchecked.json"), "-o", "json").stdout)["violations"]
    assert len(violations) > 1
    first = f"{violations[0]['where']}: {violations[0]['message']} (rate)"
    said = f"unchecked.json does not pass `hetis-plan check`: {first}, and {len(violations) - 1} more"
    assert " ".join(found.stderr.split()).count(said) == 1
    assert "does not pass" not in invoke(*asked[:2], str(folder / "running.json"), *asked[3:]).stderr


def test_the_next_plan_is_simulated_as_the_running_one_was(folder: Path) -> None:
    running = json.loads((folder / "running.json").read_text())
    running["inputs"]["service_level"] = {"ttft": "p99", "tpot": "mean", "attainment": None}
    (folder / "held.json").write_text(json.dumps(running))
    asked = ["replan", "--from", str(folder / "held.json"), "-c", str(folder / "less.yaml"), "-q"]
    told = invoke(*asked, "--out", str(folder / "held-next.json")).stdout
    plan = json.loads((folder / "held-next.json").read_text())
    assert plan["inputs"]["service_level"]["ttft"] == "p99"
    assert plan["inputs"]["verification"]["ttft_s"] >= plan["inputs"]["verification"]["ttft_p95_s"]
    assert "TTFT p99" in told
    kept = invoke("diff", str(folder / "running.json"), str(folder / "held-next.json")).stdout
    (row,) = (line for line in kept.splitlines() if line.startswith("kept in simulation /s "))
    assert row.split()[4] == "-", "the running plan was not simulated"
    assert "Simulated" not in invoke(*asked, "--no-verify").stdout
    plan["inputs"]["verification"]["router"] = "weighted-random"  # that of its target, which stays in front
    (folder / "held.json").write_text(json.dumps(plan))
    assert "behind a router that draws by weight" in invoke(*asked, "--out", str(folder / "routed.json")).stdout


@pytest.mark.parametrize(("options", "limit_s"), [((), 0.1), (("--tpot", "50ms"), 0.05), (("--tpot", "none"), None)])
def test_requests_of_more_tokens_get_back_the_limit_on_tpot(
    folder: Path, options: tuple[str, ...], limit_s: float | None
) -> None:
    """Requests of one output token have no TPOT, so that the running plan has no limit on it."""
    first, second, third = (str(folder / f"tokens-{number}.json") for number in range(3))
    asked = ["-m", "Llama-2-7B", "-w", "256/1", "--strategy", "hexgen", *options, "--no-verify", "-q"]
    assert run(["place", "-c", str(folder / "fleet.yaml"), *asked, "--out", first]) == ExitCode.OK
    for before, after, workload, expected_s in ((first, second, "200/1", None), (second, third, "256/64", limit_s)):
        again = ["--from", before, "-c", str(folder / "fleet.yaml"), "-w", workload, "--no-verify", "-q"]
        assert run(["replan", *again, "--out", after]) == ExitCode.OK
        assert json.loads(Path(after).read_text())["objective"]["tpot_limit_s"] == expected_s
        assert run(["check", after, "-q"]) == ExitCode.OK


def test_a_plan_that_survives_is_followed_by_one_for_its_demand(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = str(folder / "survives.json"), str(folder / "after.json")
    goal = ["--objective", "gpus", "--rate", "0.5", "--tpot", "none", "--ttft", "none", "--survive", "node"]
    asked = [*PROBLEM, *goal, "--no-verify", "-q", "--out", first]
    assert run(["place", "-c", str(folder / "more.yaml"), *asked]) == ExitCode.OK
    assert json.loads(Path(first).read_text())["objective"]["demand_rps"] == 0.5
    capsys.readouterr()
    again = ["--from", first, "-c", str(folder / "fleet.yaml"), "--no-verify", "--out", second]
    assert run(["replan", *again]) == ExitCode.OK
    said = "re-planning does not support --survive node: the next plan serves 0.5 requests/s with all nodes"
    assert said in " ".join(capsys.readouterr().err.split())
    after = json.loads(Path(second).read_text())
    left = after["result"]["utilisation"] * after["inputs"]["losses"]["node"]["rate"]
    assert after["objective"]["demand_rps"] == 0.5
    assert "survive" not in after["inputs"]
    assert said in after["notes"]
    assert f"{min(left, 0.5):.4g} of 0.5 requests/s are served when any one node is lost" in after["notes"]


@pytest.mark.parametrize(("rate", "survives"), [("0.5", True), ("20", False)])
def test_whether_the_next_plan_survives_is_told_and_warned_of(folder: Path, rate: str, survives: bool) -> None:
    running = json.loads((folder / "running.json").read_text())
    running["inputs"]["survive"] = "node"
    (folder / "sized.json").write_text(json.dumps(running))
    asked = ["replan", "--from", str(folder / "sized.json"), "-c", str(folder / "fleet.yaml"), "--no-verify"]
    found = invoke(*asked, "--rate", rate, "-o", "json")
    answer = json.loads(found.stdout)
    left = answer["plan"]["result"]["utilisation"] * answer["plan"]["inputs"]["losses"]["node"]["rate"]
    assert survives == (left >= float(rate))
    assert answer["survival"] == {
        "place": "node", "demand_rps": float(rate), "left_rps": pytest.approx(left), "survives": survives
    }  # fmt: skip
    words = f"{min(left, float(rate)):.4g} of {float(rate):.4g} requests/s are served when any one node is lost"
    warning = f"warning: the next plan does not survive the loss of any one node: {words}"
    assert (warning in found.stderr) != survives
    told = " ".join(invoke(*asked, "--rate", rate, "-q").stdout.split())
    assert f"Survives {'yes' if survives else 'NO'}: {words}" in told
    assert replanned(folder, "fleet.yaml")["survival"] is None


@pytest.mark.parametrize("asked", [{"tpot_limit_s": True}, {"demand_rps": "10"}, {"kind": 1.0}, [], {"demand_rps": -1}])
def test_what_was_asked_in_another_form_is_refused(
    folder: Path, tmp_path: Path, asked: object, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads((folder / "running.json").read_text())
    (tmp_path / "edited.json").write_text(json.dumps(plan | {"inputs": plan["inputs"] | {"asked": asked}}))
    edited = ["replan", "--from", str(tmp_path / "edited.json"), "-c", str(folder / "fleet.yaml"), "--dry-run"]
    assert run(edited) == ExitCode.INVALID
    assert "edited.json: inputs.asked" in " ".join(capsys.readouterr().err.split())


def test_diff_tells_what_replan_told(folder: Path) -> None:
    answer = replanned(folder, "more.yaml", "--out", str(folder / "grown.json"))
    result = invoke("diff", str(folder / "running.json"), str(folder / "grown.json"), "-o", "json")
    assert result.exit_code == 0, result.output
    diff = json.loads(result.stdout)
    assert diff["change"] == answer["change"]
    assert diff["after"]["figures"]["rate_rps"] > diff["before"]["figures"]["rate_rps"]


def test_diff_of_a_plan_with_itself_is_nothing(folder: Path) -> None:
    plan = str(folder / "running.json")
    change = json.loads(invoke("diff", plan, plan, "-o", "json").stdout)["change"]
    assert (change["moved_gpus"], change["loads"], change["dropped_requests"]) == ([], {}, 0)


def test_diff_tells_in_what_the_problems_differ(folder: Path, tmp_path: Path) -> None:
    other = json.loads((folder / "running.json").read_text())
    other["inputs"]["constraints"] = ["--forbid type=L4"]
    other["inputs"]["documents"]["cluster"]["name"] = "other"
    (tmp_path / "other.json").write_text(json.dumps(other))
    files = [str(folder / "running.json"), str(tmp_path / "other.json")]
    assert "Problems" not in invoke("diff", files[0], files[0]).stdout
    differences = json.loads(invoke("diff", *files, "-o", "json").stdout)["differences"]
    assert set(differences) == {"fleet", "constraints"}
    assert differences["constraints"]["after"] == "--forbid type=L4"
    told = invoke("diff", *files).stdout
    assert f"constraints  {differences['constraints']['before']} → --forbid type=L4" in told


@pytest.mark.parametrize("is_before", [True, False])
def test_diff_takes_a_plan_without_replicas(folder: Path, tmp_path: Path, is_before: bool) -> None:
    empty = json.loads((folder / "running.json").read_text())
    num_replicas = len(empty["replicas"])
    empty |= {"replicas": [], "kv_routes": []}
    (tmp_path / "empty.json").write_text(json.dumps(empty))
    files = [str(tmp_path / "empty.json"), str(folder / "running.json")]
    files = files if is_before else files[::-1]
    result = invoke("diff", *files, "-o", "json")
    assert result.exit_code == ExitCode.OK, result.output
    counts = json.loads(result.stdout)["change"]["counts"]
    assert counts["new" if is_before else "gone"] == num_replicas
    latencies = next(line for line in invoke("diff", *files).stdout.splitlines() if "TTFT" in line).split()[2:]
    assert latencies.index("-") == (0 if is_before else 1)
    page = tmp_path / "page.html"
    assert invoke("report", *files, "--out", str(page)).exit_code == ExitCode.OK


def test_diff_names_what_differs_in_models_of_one_name(folder: Path, tmp_path: Path) -> None:
    other = json.loads((folder / "running.json").read_text())
    other["inputs"]["documents"]["model"]["kv_bytes"] = 1.0
    (tmp_path / "other.json").write_text(json.dumps(other))
    result = invoke("diff", str(folder / "running.json"), str(tmp_path / "other.json"))
    assert result.exit_code == ExitCode.OK, result.output
    assert "with other kv_bytes; nothing is kept" in " ".join(result.output.split())


def test_the_tables_fit_80_columns(folder: Path) -> None:
    replan = invoke("replan", "--from", str(folder / "running.json"), "-c", str(folder / "less.yaml"), "-q")
    replanned(folder, "less.yaml", "--out", str(folder / "next.json"))
    diff = invoke("diff", str(folder / "running.json"), str(folder / "next.json"))
    assert replan.exit_code == diff.exit_code == 0
    assert "1 replica lost GPUs" in replan.output
    assert "KV dropped" in diff.output
    assert all(len(line) <= 80 for line in (replan.output + diff.output).splitlines())
    assert all(line.startswith(" ") for line in replan.output.partition("Lowest on the way")[2].splitlines()[1:])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-c", "fleet.yaml", "-m", "Llama-2-70B"], ExitCode.INVALID, "is a plan of meta-llama/Llama-2-7b-hf, not of"),
        (["-c", "fleet.yaml", "-m", "fp8.yaml"], ExitCode.INVALID, "with other weights, weight_bytes than --model"),
        (["-c", "missing.yaml"], ExitCode.INVALID, "missing.yaml"),
        (["-c", "none.yaml"], ExitCode.INFEASIBLE, "no plan exists"),
        (["-c", "fleet.yaml", "--horizon", "0s"], ExitCode.INVALID, "out of range"),
        (["-c", "fleet.yaml", "--out", "no/such/folder.json"], ExitCode.INVALID, "cannot be written"),
    ],
)
def test_what_cannot_be_replanned_is_refused_with_the_reason(
    folder: Path, arguments: list[str], code: ExitCode, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert run(["replan", "--from", "running.json", *arguments]) == code
    assert message in capsys.readouterr().err


def test_problems_of_all_files_are_told_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = folder / "broken.json"
    broken.write_text("{")
    assert run(["replan", "--from", str(broken), "-c", str(folder / "missing.yaml"), "-w", "x/y"]) == ExitCode.INVALID
    told = capsys.readouterr().err
    assert all(part in told for part in ("broken.json", "missing.yaml", "x/y"))
