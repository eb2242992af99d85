"""`init`, `validate`, `schema`, `catalog`, `version`: their output and its place."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml

from hetis.formats.documents import kind_of, load, load_cluster
from hetis.planner.cli.app import run
from hetis.planner.cli.files import FILE_KINDS, SAMPLES, Catalogue
from tests.formats.traces import test_trace_forms
from tests.planner.command_line import EXAMPLES, invoke
from tools.reference import FILE_EXAMPLES


def test_init_writes_files_that_validate(tmp_path: Path) -> None:
    assert invoke("init", str(tmp_path / "new")).exit_code == 0
    files = [str(tmp_path / "new" / name) for name in SAMPLES]
    result = invoke("validate", *files, "-o", "json")
    assert result.exit_code == 0
    assert [entry["ok"] for entry in json.loads(result.stdout)] == [True, True]


def test_init_names_every_file_it_would_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in SAMPLES:
        (tmp_path / name).write_text("mine")
    assert run(["init", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert all(f"{tmp_path / name}: already exists; --force overwrites it" in err for name in SAMPLES)
    assert {(tmp_path / name).read_text() for name in SAMPLES} == {"mine"}


def test_every_example_is_valid() -> None:
    examples = [path for folder in (".", "files", "dispatch") for path in sorted(EXAMPLES.glob(f"{folder}/*.yaml"))]
    result = invoke("validate", *map(str, examples))
    assert result.exit_code == 0, result.stderr


def test_every_kind_of_file_but_plans_has_an_example_of_its_own() -> None:
    for kind, path in FILE_EXAMPLES.items():
        assert kind_of(load(EXAMPLES.parent / path)) == kind
    assert set(FILE_KINDS) - FILE_EXAMPLES.keys() == {"Plan"}


OURS = "arrival_s,prompt_tokens,output_tokens\n0,374,44\n"
ONE = {"arrival_s": 0, "prompt_tokens": 374, "output_tokens": 44}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_hidden_layers": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "torch_dtype": "float16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.csv", OURS, "Workload"),
        ("a.csv.gz", OURS, "Workload"),
        ("a.tsv", OURS.replace(",", "\t"), "Workload"),
        ("a.tsv.gz", OURS.replace(",", "\t"), "Workload"),
        ("a.jsonl", json.dumps(ONE), "Workload"),
        ("a.jsonl.gz", json.dumps(ONE), "Workload"),
        ("a.log", test_trace_forms.VLLM_LOG, "Workload"),
        ("config.json", json.dumps(CONFIG), "ModelSpec"),
        ("llama-config.json", json.dumps({**CONFIG, "model_type": "llama"}), "ModelSpec"),
        ("llama.json", json.dumps(CONFIG), "ModelSpec"),
    ],
)
def test_validate_reads_whatever_place_reads(name: str, content: str | bytes, kind: str, tmp_path: Path) -> None:
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    result = invoke("validate", str(tmp_path / name), "-o", "json")
    assert result.exit_code == 0, result.stdout
    assert json.loads(result.stdout)[0]["kind"] == kind


def test_validate_lists_all_problems_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "apiVersion: hetis/v1\nkind: Cluster\nname: a\nnodess: []\nnetwork: {latency: 2m}\n"
    )
    (tmp_path / "b.yaml").write_text("kind: Clustr\n")
    result = invoke(
        "validate", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), str(tmp_path / "c.yaml"), "-o", "json"
    )
    assert result.exit_code == 2
    entries = json.loads(result.stdout)
    assert [entry["ok"] for entry in entries] == [False, False, False]
    assert len(entries[0]["problems"]) >= 3
    for entry in entries:
        for problem in entry["problems"]:
            assert problem["message"] in result.stderr
    assert "did you mean nodes?" in result.stderr
    assert "no such file" in result.stderr


def test_validate_warns_of_gpus_that_no_plan_can_use_yet(tmp_path: Path) -> None:
    """`place` refuses the file without --profile; so it is valid, but not all that a plan needs."""
    fleet = tmp_path / "fleet.yaml"
    card = "{memory: 80GiB, memory_bandwidth: 3TB/s, fp16: 800TFLOPS}"
    fleet.write_text(
        "apiVersion: hetis/v1\nkind: Cluster\nname: new\nnodes: [{name: a, gpus: [{type: Own}]}]\n"
        f"network: {{bandwidth: 100Gbps, latency: 20us}}\ngpu_types: {{Own: {card}}}\n"
    )
    result = invoke("validate", str(fleet), "-o", "json")
    assert result.exit_code == 0, result.stderr
    (entry,) = json.loads(result.stdout)
    assert entry["ok"]
    (warning,) = entry["warnings"]
    assert warning.startswith("Own: no efficiencies for architecture 'unknown'")
    assert f"warning: {fleet}: {warning}" in result.stderr
    assert "--profile FILE" in warning
    fleet.write_text(fleet.read_text().replace("80GiB,", "80GiB, architecture: Hopper,"))
    result = invoke("validate", str(fleet))
    assert (result.exit_code, "warning" in result.stderr) == (0, False)
    fleet.write_text(fleet.read_text().replace("Hopper,", "CDNA3, vendor: NVIDIA,"))
    result = invoke("validate", str(fleet))
    assert f"warning: {fleet}: Own is said to be of NVIDIA, its architecture CDNA3 is AMD's" in result.stderr


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_every_kind_has_a_json_schema(kind: str) -> None:
    result = invoke("schema", kind.lower())
    assert result.exit_code == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(result.stdout))


@pytest.mark.parametrize("which", [which for which in get_args(Catalogue) if which != "add"])
def test_catalogues_print_the_same_entries_in_every_form(which: str) -> None:
    as_json = json.loads(invoke("catalog", which, "-o", "json").stdout)
    assert yaml.safe_load(invoke("catalog", which, "-o", "yaml").stdout) == as_json
    least = {"gpus": 54, "models": 44, "workloads": 6, "strategies": 5}
    assert len(as_json) >= least[which]
    table = invoke("catalog", which).stdout
    assert len(table.splitlines()) >= len(as_json)
    assert max(map(len, table.splitlines())) <= 80


def test_version_names_hetis_and_its_libraries() -> None:
    versions = json.loads(invoke("version", "-o", "json").stdout)
    assert {"hetis", "python", "numpy", "highspy", "numba"} <= versions.keys()
    assert re.match(r"hetis \d+\.\d+", invoke("version").stdout)
    assert invoke("--version").stdout == f"hetis-plan {versions['hetis']}\n"


FIGURES = ("--memory", "24GiB", "--memory-bandwidth", "960GB/s", "--fp16", "122TFLOPS", "--pcie", "32GB/s")


def test_a_gpu_that_the_catalogue_lacks_is_added_by_five_figures(tmp_path: Path) -> None:
    """The entry is printed, or put into a cluster file, whose comments and other types stay."""
    path = tmp_path / "c.yaml"
    text = (
        "# ours\napiVersion: hetis/v1\nkind: Cluster\nname: c\nnodes: [{name: n, gpus: [{type: L4}]}]\n"
        "network: {bandwidth: 100Gbps, latency: 20us}\n"
    )
    path.write_text(text)
    printed = invoke("catalog", "add", "X9", *FIGURES, "--architecture", "RDNA3")
    assert yaml.safe_load(printed.stdout)["gpu_types"]["X9"]["memory"] == "24GiB"
    for name in ("X9", "X10"):
        done = invoke("catalog", "add", name, *FIGURES, "--architecture", "RDNA3", "--into", str(path))
        assert done.exit_code == 0, done.stderr
    assert path.read_text().startswith(text)
    assert {"X9", "X10"} <= load_cluster(path).gpu_types.keys()
    assert load_cluster(path).gpu_types["X9"].fp16_flops == 122e12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("X9", *FIGURES), "catalog add needs --architecture"),
        (("L40S", *FIGURES, "--architecture", "Ada"), "'L40S' is L40S of the catalogue: give another name"),
        (("X9", *FIGURES, "--architecture", "Adda"), "has the architecture 'Adda', did you mean Ada?"),
        (("X9", "--memory", "24", *FIGURES[2:], "--architecture", "Ada"), "gpu_types.X9.memory: '24' is not a size"),
    ],
)
def test_what_is_no_gpu_is_not_added(arguments: tuple[str, ...], said: str) -> None:
    done = invoke("catalog", "add", *arguments)
    assert done.exit_code != 0
    assert said in " ".join(f"{done.stderr} {done.exception}".replace("│", " ").split())
    assert "--memory is for `catalog add`" in invoke("catalog", "gpus", "--memory", "1GiB").stderr
