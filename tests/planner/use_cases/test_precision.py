"""`--weights` and `--kv`: plans in a precision use GPUs that support it, and name those that do not, with reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetis.engines.serving import TELL_KV
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.use_cases.precision import for_engine, in_precision
from hetis.planner.use_cases.sources import engine_rules, load_inputs
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Op
from tests.fleets import fleet

HUGGINGFACE = Path(__file__).parents[2] / "formats" / "huggingface"
FLEET = fleet("old and new", "a100: 1 A100-SXM-40GB", "v100: 2 V100-SXM2-32GB")
REASON = "needs compute capability 7.5 or higher for fp8 weights, V100-SXM2-32GB (Volta) has 7"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fleet.yaml").write_text(FLEET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def place(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    model = () if "-m" in options else ("-m", "Meta-Llama-3-8B")
    inputs = ("place", "-c", "fleet.yaml", *model, "-w", "1024/256", "-q", "-o", "json")
    assert run([*inputs, "--no-verify", "--strategy", "uniform", *options]) == ExitCode.OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def gpus_of(plan: dict[str, Any]) -> set[str]:
    return {stage["gpu"] for replica in plan["replicas"] for stage in replica["stages"]}


def test_a_plan_in_fp8_leaves_out_what_cannot_run_it_and_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, quantised = place(capsys, "--engine", "vllm"), place(capsys, "--engine", "vllm", "--weights", "fp8")
    assert gpus_of(plain) == {"A100-SXM-40GB"}
    start = "V100-SXM2-32GB left out: vllm 0.32.0 needs compute capability 7.5 or higher for any model"
    assert any(note.startswith(start) for note in plain["notes"])
    assert gpus_of(quantised) == {"A100-SXM-40GB"}
    assert quantised["inputs"]["documents"]["model"]["weights"] == "fp8"
    assert any(note.startswith("V100-SXM2-32GB left out: ") and REASON in note for note in quantised["notes"])
    assert any(note == "A100-SXM-40GB: weights are fp8, products 16-bit (Marlin)" for note in quantised["notes"])
    (folder / "plan.json").write_text(json.dumps(quantised))
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK
    capsys.readouterr()
    assert run(["explain", "plan.json"]) == ExitCode.OK
    text = " ".join(capsys.readouterr().out.split())
    assert "× V100-SXM2-32GB: vllm does not run this model on them" in text
    assert "they are forbidden" not in text, "nobody gave --forbid"


def test_more_requests_fit_in_fp8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rooms = [
        place(capsys, "--engine", "vllm", "--forbid", "type=V100-SXM2-32GB", *precision)["replicas"][0]["kv_tokens"]
        for precision in ((), ("--weights", "fp8"), ("--weights", "fp8", "--kv", "fp8"))
    ]
    assert rooms[0] < rooms[1] < rooms[2]
    assert rooms[2] > 1.9 * rooms[1]


def test_kv_of_a_checkpoint_is_the_plans_unless_asked_otherwise(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ModelOpt's checkpoints state FP8, which vLLM applies by itself; the engine gets the plan's in any case."""
    config = json.loads((HUGGINGFACE / "Qwen__Qwen2.5-7B-Instruct.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    (folder / "config.json").write_text(json.dumps(config))
    inputs = ("-m", "config.json", "--engine", "vllm-hetis")
    stated, chosen = place(capsys, *inputs), place(capsys, *inputs, "--kv", "bf16")
    assert [plan["inputs"]["documents"]["model"]["kv_bytes"] for plan in (stated, chosen)] == [1.0, 2.0]
    assert "no attention workers: they keep KV in 16 bits (--kv bf16)" in stated["notes"]
    assert f"KV fp8 in the model's file, bf16 in the plan: {TELL_KV}" in chosen["notes"]
    assert not any("in the model's file" in note for note in stated["notes"])
    loaded = load_inputs(cluster="fleet.yaml", model="config.json", workload="1024/256")
    [note] = in_precision(loaded, weights=None, kv="V100-SXM2-32GB=bf16").notes
    assert note == f"KV fp8 in the model's file, bf16 on V100-SXM2-32GB: {TELL_KV}"
    assert in_precision(loaded, weights=None, kv="fp8").notes == ()
    (folder / "plan.json").write_text(json.dumps(chosen))
    export = ("export", "plan.json", "--to", "vllm", "--model", "/models/m")
    assert run([*export, "--", "--kv-cache-dtype", "bfloat16"]) == ExitCode.OK
    told = capsys.readouterr()
    assert "--kv-cache-dtype bfloat16" in told.out
    assert TELL_KV not in " ".join(told.err.split())
    assert run([*export, "--strict"]) == ExitCode.MISSED
    assert f"KV in 16 bits (r0): {TELL_KV}" in " ".join(capsys.readouterr().err.split())
    assert run([*export, "--", "--kv-cache-dtype", "fp8"]) == ExitCode.INVALID
    assert "--kv-cache-dtype cannot be passed to the engine: the plan sets it" in capsys.readouterr().err


def test_workers_may_be_gpus_that_cannot_compute_in_the_format(folder: Path) -> None:
    loaded = load_inputs(cluster="fleet.yaml", model="Meta-Llama-3-8B", workload="1024/256")
    rules = engine_rules("vllm-hetis", "hetis")
    held = for_engine(in_precision(loaded, weights="fp8", kv=None), rules)
    assert [str(each) for each in held.inputs.constraints] == ["--forbid type=V100-SXM2-32GB:as=primary"]
    fp8_kv = for_engine(in_precision(loaded, weights="fp8", kv="fp8"), rules)
    assert [str(each) for each in fp8_kv.inputs.constraints] == [
        "--forbid type=V100-SXM2-32GB",
        "--forbid workers",
    ]
    plain = for_engine(loaded, rules)
    assert [str(each) for each in plain.inputs.constraints] == ["--forbid type=V100-SXM2-32GB:as=primary"]
    assert for_engine(plain, rules) == plain
    assert for_engine(loaded, None) == loaded


def test_models_whose_heads_the_plugin_cannot_place_are_planned_without_workers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace("count: 1", "count: 8"))
    for model, why in (
        (
            "Llama-4-Scout-17B-16E-Instruct",
            "the model attends to chunks of its context, which the plugin does not support",
        ),
        ("DeepSeek-V3", "attention is latent (MLA), and its KV cannot be split into head groups"),
    ):
        loaded = load_inputs(cluster="fleet.yaml", model=model, workload="1024/256")
        held = for_engine(in_precision(loaded, weights="bf16", kv="bf16"), engine_rules("vllm-hetis", "hetis"))
        assert [str(each) for each in held.inputs.constraints][-1] == "--forbid workers"
        assert f"no attention workers: {why}" in held.notes
        assert for_engine(in_precision(loaded, weights="bf16", kv="bf16"), None).inputs.constraints == ()
    inputs = ("-m", "Llama-4-Scout-17B-16E-Instruct", "--engine", "vllm-hetis", "--ttft", "none", "--tpot", "none")
    plan = place(capsys, *inputs)
    assert any(note.startswith("no attention workers: the model attends to chunks") for note in plan["notes"])


def test_gpus_that_exports_leave_out_are_planned_only_where_the_others_have_no_room(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A defect in the past: half of a plan was on Gaudi, so that no export carried any rung."""
    why = "hetis starts no processes on GPUs of Intel, and exports leave out their replicas"
    (folder / "fleet.yaml").write_text(FLEET.replace("V100-SXM2-32GB", "Gaudi2-96GB"), encoding="utf-8")
    mixed = place(capsys)
    assert gpus_of(mixed) == {"A100-SXM-40GB"}
    assert f"Gaudi2-96GB left out: {why}" in mixed["notes"]
    assert not any("one vendor" in note for note in mixed["notes"])
    (folder / "fleet.yaml").write_text(fleet("f", "t4: 1 T4", "gaudi: 2 Gaudi2-96GB"), encoding="utf-8")
    alone = place(capsys)
    assert gpus_of(alone) == {"Gaudi2-96GB"}, "the T4 holds no 16 GB of weights"
    assert f"Gaudi2-96GB: {why}" in alone["notes"]


def test_a_fleet_of_several_vendors_is_told_that_replicas_stay_apart(folder: Path) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace("A100-SXM-40GB", "MI300X"), encoding="utf-8")
    loaded = load_inputs(cluster="fleet.yaml", model="Meta-Llama-3-8B", workload="1024/256")
    alone = for_engine(loaded, engine_rules("vllm", "hetis"))
    assert not any("one vendor" in note for note in alone.notes), "V100s are left out"
    (folder / "fleet.yaml").write_text(FLEET.replace("V100-SXM2-32GB", "MI300X"), encoding="utf-8")
    loaded = load_inputs(cluster="fleet.yaml", model="Meta-Llama-3-8B", workload="1024/256")
    said = "a replica, and the KV that it exchanges, stays with GPUs of one vendor "
    said += "(NVIDIA: A100-SXM-40GB; AMD: MI300X-192GB)"
    assert (
        f"{said}; --kv-between-vendors lets KV go between them"
        in for_engine(loaded, engine_rules("vllm", "hetis")).notes
    )
    assert said in for_engine(loaded, engine_rules("sglang", "hetis")).notes
    assert not any("vendor" in note for note in for_engine(loaded, None).notes)
    across = engine_rules("vllm", "hetis", kv_between_vendors=True)
    (told,) = (note for note in for_engine(loaded, across).notes if "vendor" in note)
    assert told.startswith("a replica stays with GPUs of one vendor")
    assert "KV of 16 bits may go between NVIDIA, AMD, Intel" in told
    with pytest.raises(InvalidProblemError, match="KV between vendors is not known to work in sglang"):
        engine_rules("sglang", "hetis", kv_between_vendors=True)


def test_where_no_gpu_runs_it_the_reasons_are_the_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_inputs(cluster="fleet.yaml", model="Meta-Llama-3-8B", workload="1024/256")
    with pytest.raises(InvalidProblemError, match="mxfp4 is a format of experts"):
        for_engine(in_precision(loaded, weights="mxfp4", kv=None), engine_rules("vllm", "hetis"))
    inputs = ("place", "-c", "fleet.yaml", "-m", "Meta-Llama-3-8B", "-w", "1024/256")
    assert run([*inputs, "--weights", "mxfp4"]) == ExitCode.INVALID
    assert "mxfp4 is a format of experts" in capsys.readouterr().err
    assert run([*inputs, "--weights", "fp9"]) == ExitCode.INVALID
    assert "did you mean fp8?" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_gpu_types_that_lack_the_same_share_its_reason(folder: Path) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace("A100-SXM-40GB", "P100-PCIe-16GB"), encoding="utf-8")
    loaded = load_inputs(cluster="fleet.yaml", model="Meta-Llama-3-8B", workload="1024/256")
    with pytest.raises(InvalidProblemError) as caught:
        for_engine(in_precision(loaded, weights="fp8", kv=None), engine_rules("vllm", "hetis"))
    reasons = str(caught.value).split("; ")
    needs = "vllm 0.32.0 needs compute capability 7.5 or higher for fp8 weights"
    assert reasons[0].startswith(f"{needs}, P100-PCIe-16GB (Pascal) has 6, V100-SXM2-32GB (Volta) has 7 (vLLM's repos")
    assert not any("compute capability" in reason for reason in reasons[1:])


def test_a_fleet_that_is_changed_is_held_to_the_table_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Added GPUs are left out as well if they do not support the precision: nothing is gained."""
    inputs = ("-c", "fleet.yaml", "-m", "Meta-Llama-3-8B", "-w", "1024/256", "--engine", "vllm", "--weights", "fp8")
    options = ("--strategy", "uniform", "--add", "2xV100-PCIe-16GB", "-q", "-o", "json")
    assert run(["what-if", *inputs, *options]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    before, after = (found[side]["plan"]["result"]["value"] for side in ("before", "after"))
    assert before == pytest.approx(after)
    assert gpus_of(found["after"]["plan"]) == {"A100-SXM-40GB"}


def test_engines_are_compared_where_one_of_them_does_not_run_the_precision(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace("A100-SXM-40GB", "T4"))
    inputs = ("compare", "-c", "fleet.yaml", "-m", "Llama-2-7B", "-w", "1024/256", "--weights", "fp8", "--tpot", "none")
    options = ("--engine", "vllm,sglang", "--strategies", "uniform", "--no-verify", "-o", "json", "-q")
    assert run([*inputs, *options]) == ExitCode.OK
    vllm, sglang = json.loads(capsys.readouterr().out)["strategies"]
    assert gpus_of(vllm["plan"]) == {"T4"}
    assert (sglang["plan"], sglang["status"]) == (None, "no plan")
    needs = "sglang 0.5 needs compute capability 8 or higher for fp8 weights, T4 (Turing) has 7.5"
    assert needs in sglang["reasons"][0]


def test_what_the_engine_needs_is_not_told_as_an_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody gave `--forbid type=V100-SXM2-32GB:as=primary`: plans only write so that vLLM computes nothing there."""
    inputs = ("place", "-c", "fleet.yaml", "-m", "Meta-Llama-3-8B", "-w", "1024/256", "-q")
    assert run([*inputs, "--tpot", "1ms"]) == ExitCode.INFEASIBLE
    said = capsys.readouterr().err
    assert "given p95 TTFT limit 2 s and vllm-hetis computing no layers on V100-SXM2-32GB: " in said
    assert "--forbid" not in said
    options = ("--no-verify", "--strategy", "uniform", "--html", "plan.html")
    assert run([*inputs, "--engine", "vllm", "--forbid", "tp=2", *options, "--out", "plan.json"]) == ExitCode.OK
    said = " ".join(capsys.readouterr().out.split())
    assert "Constraints: vllm not running on V100-SXM2-32GB; --forbid tp=2. " in said, "of what was searched"
    assert "--forbid type" not in (folder / "plan.html").read_text()
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["inputs"]["constraints"] == ["--forbid type=V100-SXM2-32GB", "--forbid tp=2"]
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK
    plan["family"] = plan["family"].replace("vllm not running on ", "--forbid type=")  # as earlier plans have it
    (folder / "plan.json").write_text(json.dumps(plan))
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK


@pytest.mark.parametrize(
    ("gpu", "engine", "weights", "instead"),
    [
        ("T4", "sglang", "fp8", "; vllm-hetis runs it here: --engine vllm-hetis; vllm runs it here: --engine vllm"),
        ("L4", "vllm", "bnb-int4", "; sglang runs it here: --engine sglang"),
    ],
)
def test_where_an_engine_runs_on_no_gpu_others_are_offered(
    folder: Path, capsys: pytest.CaptureFixture[str], gpu: str, engine: str, weights: str, instead: str
) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace("A100-SXM-40GB", gpu).replace("V100-SXM2-32GB", gpu))
    inputs = ("place", "-c", "fleet.yaml", "-m", "Meta-Llama-3-8B", "-w", "1024/256", "-q", "--dry-run")
    assert run([*inputs, "--engine", engine, "--weights", weights]) == ExitCode.INVALID
    said = capsys.readouterr().err
    assert f"{'SGLang' if engine == 'sglang' else 'vLLM'}'s repository, " in said
    assert instead in said


MIXED = fleet("mixed", "h100: 4 H100-SXM-80GB", "a100: 4 A100-SXM-40GB", "l4: 2 L4")

TWO_TYPES = ("--pin", "replicas=1", "--rung", "pipelines")


@pytest.fixture
def mixed(folder: Path) -> Path:
    (folder / "mixed.yaml").write_text(MIXED)
    return folder


def place_mixed(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    inputs = ("place", "-c", "mixed.yaml", "-m", "Llama-2-70B", "-w", "1024/256", "-q", "-o", "json")
    assert run([*inputs, "--no-verify", *options]) == ExitCode.OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_gpu_types_have_precisions_of_their_own(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--weights", "bf16,H100=fp8")
    plan, one = place_mixed(capsys, *options), place_mixed(capsys, "--weights", "bf16", *TWO_TYPES)
    model = plan["inputs"]["documents"]["model"]
    assert model["precisions"] == {"H100-SXM-80GB": {"weights": "fp8", "weight_bytes": 1.0, "kv_bytes": 2.0}}
    groups = [{stage["gpu"] == "H100-SXM-80GB" for stage in replica["stages"]} for replica in plan["replicas"]]
    assert all(len(group) == 1 for group in groups), "a replica computes in one precision"
    assert {True} in groups
    assert {True, False} in [{s["gpu"] == "H100-SXM-80GB" for s in r["stages"]} for r in one["replicas"]]
    for route in plan.get("kv_routes", []):
        assert groups[route["prefill"]] == groups[route["decode"]]
    (mixed / "plan.json").write_text(json.dumps(plan))
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK
    assert run(["simulate", "plan.json", "-q", "--requests", "200"]) == ExitCode.OK
    assert run(["explain", "plan.json", "-q"]) == ExitCode.OK
    said = " ".join(capsys.readouterr().out.split())
    assert "Precision weights bf16, KV bf16; on H100-SXM-80GB: weights fp8, KV bf16" in said


def test_a_replica_of_two_precisions_is_found_by_the_checker(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = place_mixed(capsys, "--weights", "bf16", *TWO_TYPES)
    assert any(len({stage["gpu"] for stage in replica["stages"]}) > 1 for replica in plan["replicas"])
    own = {"weights": "bf16", "weight_bytes": 2.0, "kv_bytes": 1.0}
    plan["inputs"]["documents"]["model"]["precisions"] = {"H100-SXM-80GB": own}
    (mixed / "plan.json").write_text(json.dumps(plan))
    assert run(["check", "plan.json", "-q"]) == ExitCode.INVALID
    said = " ".join(capsys.readouterr().out.split())
    assert "has stages in 2 precisions on" in said


def test_an_export_finds_the_checkpoint_of_each_precision(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mixed / "plan.json").write_text(json.dumps(place_mixed(capsys, "--weights", "bf16,H100=fp8")))
    assert run(["export", "plan.json", "--to", "vllm", "--model", "/models/llama", "--out", "no"]) != ExitCode.OK
    assert "the plan has weights in fp8 and bf16: --model must contain {weights}" in capsys.readouterr().err
    assert run(["export", "plan.json", "--to", "vllm", "--model", "/models/llama-{weights}", "--out", "out"]) == 0
    scripts = "".join(path.read_text() for path in (mixed / "out").rglob("*.sh"))
    assert "/models/llama-fp8" in scripts
    assert "/models/llama-bf16" in scripts
    assert "{weights}" not in scripts
    assert scripts.count("--served-model-name meta-llama/Llama-2-70b-hf") > 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--weights", "fp8,A10=bf16"), "precision: cluster mixed has no GPU type 'A10', it has H100-SXM-80GB"),
        (("--weights", "fp8,H100=bf16", "--strategy", "hexgen-paper"), "has several precisions, which published"),
        (("--weights", "H100=bf16,H100-SXM-80GB=fp8"), "names a GPU type twice"),
    ],
)
def test_precisions_that_cannot_be(
    mixed: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], error: str
) -> None:  # fmt: skip
    assert run(["place", "-c", "mixed.yaml", "-m", "Llama-2-70B", "-w", "1024/256", *options]) == ExitCode.INVALID
    assert error in " ".join(capsys.readouterr().err.split())


def test_a_plan_says_which_attention_backend_its_replicas_must_be_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace("V100-SXM2-32GB, count: 2", "T4, count: 1"), encoding="utf-8")
    inputs = ("place", "-c", "fleet.yaml", "-m", "Llama-3.2-1B", "-w", "1024/256", "-q", "-o", "json", "--no-verify")
    roles = ("--roles", "prefill,decode", "--ttft", "none", "--tpot", "none")
    told = []
    for engine in ("vllm", "sglang"):
        assert run([*inputs, *roles, "--engine", engine]) == ExitCode.OK
        plan = json.loads(capsys.readouterr().out)
        assert {stage["gpu"] for one in plan["replicas"] for stage in one["stages"]} == {"A100-SXM-40GB", "T4"}
        told.append([note for note in plan["notes"] if "attention backend" in note])
    says = "KV goes between A100-SXM-40GB, T4, which needs one attention backend: TRITON_ATTN "
    assert told == [[f"{says}(exports and agents tell it)"], []]


def test_a_dense_model_in_mxfp4_is_planned_for_vllm_on_cdna4_with_four_bit_products(folder: Path) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace("A100-SXM-40GB", "MI355X"), encoding="utf-8")
    loaded = load_inputs(cluster="fleet.yaml", model="Meta-Llama-3-8B", workload="1024/256")
    held = for_engine(in_precision(loaded, weights="mxfp4", kv=None), engine_rules("vllm", "hetis")).inputs
    assert [str(each) for each in held.constraints] == ["--forbid type=V100-SXM2-32GB"]
    fit = held.profiles["MI355X-288GB"].fit(Op.DENSE, held.model, 1)
    assert fit.scope.weight_bytes == held.model.weight_bytes == 0.53125
