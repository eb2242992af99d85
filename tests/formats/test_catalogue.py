"""The catalogue holds the facts of the reference tables and understands common names."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

from hetis.formats import catalogue
from hetis.formats.catalogue import UnknownNameError
from hetis.solver.workload import LengthBin, moments_of
from tools.catalogue import build

DATA = Path(__file__).parents[3] / "shared" / "data"
PACKAGED = Path(catalogue.__file__).parent / "data"


@pytest.fixture
def data() -> Path:
    if not DATA.exists():
        pytest.skip(f"REFERENCE DATA MISSING: {DATA} does not exist, the catalogue cannot be compared with its sources")
    return DATA


def test_building_again_gives_the_committed_files_byte_for_byte(data: Path) -> None:
    files = build(data)
    assert {name: (PACKAGED / name).read_text(encoding="utf-8") for name in files} == files
    assert {str(path.relative_to(PACKAGED)) for path in PACKAGED.rglob("*.json")} == set(files)


def test_only_boards_with_links_to_all_others_have_nvlink() -> None:
    linked = {entry.gpu.name for entry in catalogue.gpus() if entry.gpu.nvlink_bytes_per_s is not None}
    assert {"H20", "GH200-96GB", "GB200-per-GPU", "MI300X-192GB", "Gaudi3-128GB", "P100-SXM2-16GB"} <= linked
    assert not {name for name in linked if "PCIe" in name or "NVL-" in name or "RTX" in name}


def test_every_model_is_there_and_its_numbers_add_up(data: Path) -> None:
    with open(data / "models.csv", encoding="utf-8", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    entries = [entry for entry in catalogue.models() if entry.source != "config.json and model card"]
    assert [entry.model.name for entry in entries] == list(rows)
    for entry in entries:
        row = rows[entry.model.name]
        assert entry.model.params() / 1e9 == pytest.approx(float(row["params_b"]), rel=0.01), entry.model.name
        assert entry.model.active_params() / 1e9 == pytest.approx(float(row["active_params_b"]), rel=0.01)
        assert entry.model.kv_bytes_per_token() == float(row["kv_bytes_per_token_16bit"]), entry.model.name


@pytest.mark.parametrize("name", catalogue.workload_names())
def test_a_workload_summary_keeps_the_averages_of_its_trace(name: str, data: Path) -> None:
    with gzip.open(data / "traces" / f"{name}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]
    exact = moments_of([LengthBin(prompt_tokens=p, output_tokens=o, weight=1.0) for p, o in rows], block_tokens=16)
    entry = catalogue.find_workload(name)
    summary = entry.workload.moments()
    assert len(entry.workload.bins) <= 600
    assert entry.num_requests == len(rows)
    assert summary.mean_prompt == pytest.approx(exact.mean_prompt, rel=1e-12)
    assert summary.mean_output == pytest.approx(exact.mean_output, rel=1e-12)
    for field in ("prefill_pairs", "resident_context", "prefilling_context"):
        assert getattr(summary, field) == pytest.approx(getattr(exact, field), rel=0.005), field
    for field in ("p95_prompt", "resident_context_sd"):  # preserved well, although the bins do not target them
        assert getattr(summary, field) == pytest.approx(getattr(exact, field), rel=0.02), field


@pytest.mark.parametrize("entry", catalogue.gpus(), ids=lambda entry: entry.gpu.name)
def test_a_gpu_is_found_by_its_name_in_any_spelling(entry: catalogue.GpuEntry) -> None:
    name = entry.gpu.name
    for spelling in (name, name.lower(), name.upper(), name.replace("-", "_"), name.replace("-", " ")):
        assert catalogue.find_gpu(spelling).gpu.name == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("a100-80gb-sxm", "A100-SXM-80GB"),
        ("a100_sxm_80gb", "A100-SXM-80GB"),
        ("A100SXM80GB", "A100-SXM-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe-80GB"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2-32GB"),
        ("3090", "RTX-3090"),
        ("RTX3090", "RTX-3090"),
        ("l4", "L4"),
        ("L40", "L40"),
        ("a10", "A10"),
        ("P100-12GB", "P100-PCIe-12GB"),
        ("MI300X", "MI300X-192GB"),
        ("gb200", "GB200-per-GPU"),
        ("NVIDIA H200", "H200-SXM-141GB"),
        ("NVIDIA H200 NVL", "H200-NVL-141GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000-Server-96GB"),
        ("NVIDIA B300 SXM6 AC", "B300-SXM-288GB"),
        ("Intel(R) Arc(TM) Pro B60 Graphics", "Arc-Pro-B60-24GB"),
        ("AMD Instinct MI300X OAM", "MI300X-192GB"),
        ("AMD_Instinct_MI300X_VF", "MI300X-192GB"),
        ("NVIDIA H800 80GB HBM3", "H800-SXM-80GB"),
        ("NVIDIA GH200 120GB", "GH200-96GB"),
        ("GH100 [H100 SXM5 80GB]", "H100-SXM-80GB"),
        ("NVIDIA Corporation AD102GL [RTX 6000 Ada Generation] (rev a1)", "RTX-6000-Ada"),
        ("HL-325L", "Gaudi3-128GB"),
        ("910B4", "Ascend-910B4-32GB"),
        ("v5litepod-8", "TPU-v5e"),
        ("v6e-4", "TPU-v6e"),
    ],
)
def test_usual_gpu_aliases(spelling: str, name: str) -> None:
    assert catalogue.find_gpu(spelling).gpu.name == name


def test_an_ambiguous_gpu_is_refused_with_the_candidates() -> None:
    with pytest.raises(UnknownNameError) as caught:
        catalogue.find_gpu("A100")
    assert str(caught.value) == (
        "unknown GPU 'A100': ambiguous, one of A100-PCIe-40GB, A100-SXM-40GB, A100-PCIe-80GB, A100-SXM-80GB"
    )
    assert caught.value.candidates == ("A100-PCIe-40GB", "A100-SXM-40GB", "A100-PCIe-80GB", "A100-SXM-80GB")


@pytest.mark.parametrize(
    "other",
    [
        *("NVIDIA A30X", "NVIDIA L40G", "NVIDIA T4G", "AMD Instinct MI300A", "TPU v5p", "Ascend910A", "NVIDIA TITAN V"),
        *("NVIDIA GeForce RTX 3080 Laptop GPU", "NVIDIA RTX 4000 SFF Ada Generation", "NVIDIA RTX PRO 5000 72GB"),
    ],
)
def test_another_card_has_no_card_with_a_similar_name_as_its_hint(other: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        catalogue.find_gpu(other)
    assert not caught.value.candidates


@pytest.mark.parametrize("spelling", ["", "80GB", "sxm", "pcie-80gb", "A1000", "B10000", "nvidia", "x" * 10_000])
def test_what_names_no_gpu_is_refused(spelling: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown GPU"):
        catalogue.find_gpu(spelling)


@pytest.mark.parametrize("entry", catalogue.models(), ids=lambda entry: entry.model.name)
def test_a_model_is_found_by_its_name_in_any_case_and_without_its_organisation(entry: catalogue.ModelEntry) -> None:
    name = entry.model.name
    for spelling in (
        name,
        name.lower(),
        name.upper(),
        name.partition("/")[2],
        name.partition("/")[2].replace("-", "_"),
    ):
        assert catalogue.find_model(spelling).model.name == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Llama-2-70B", "meta-llama/Llama-2-70b-hf"),
        ("llama2-70b", "meta-llama/Llama-2-70b-hf"),
        ("Llama-2-70b-chat-hf", "meta-llama/Llama-2-70b-hf"),
        ("Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B"),
        ("Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-70B"),
        ("meta-llama/Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-70B"),
        ("Meta-Llama-3.1-70B-Instruct", "meta-llama/Meta-Llama-3.1-70B"),
        ("Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("deepseek-r1", "deepseek-ai/DeepSeek-V3"),
        ("DeepSeek-R1-0528", "deepseek-ai/DeepSeek-V3"),
        ("deepseek-ai/DeepSeek-V3.1", "deepseek-ai/DeepSeek-V3"),
        ("GLM-5.1", "zai-org/GLM-5"),
        ("gemma-2-9b-it", "google/gemma-2-9b"),
        ("bloom-176b", "bigscience/bloom"),
    ],
)
def test_usual_model_aliases(spelling: str, name: str) -> None:
    assert catalogue.find_model(spelling).model.name == name


def test_an_ambiguous_model_is_refused_with_the_candidates() -> None:
    with pytest.raises(UnknownNameError) as caught:
        catalogue.find_model("Llama-70B")
    assert caught.value.candidates == (
        "meta-llama/Llama-2-70b-hf",
        "meta-llama/Meta-Llama-3-70B",
        "meta-llama/Meta-Llama-3.1-70B",
        "meta-llama/Llama-3.3-70B-Instruct",
    )


@pytest.mark.parametrize(
    ("spelling", "suggestion"),
    [
        ("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.1"),  # another vocabulary and no window: not the same model
        ("somebody/Llama-2-70b-hf", "meta-llama/Llama-2-70b-hf"),  # could be any model
        ("Qwen3-31B", "Qwen/Qwen3-32B"),
        ("Llama-2-77B", "meta-llama/Llama-2-7b-hf"),  # its ending is no difference
    ],
)
def test_a_similar_model_is_suggested_but_not_taken(spelling: str, suggestion: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        catalogue.find_model(spelling)
    assert str(caught.value) == f"unknown model {spelling!r}, did you mean {suggestion}?"


def test_workload_names_may_be_short() -> None:
    assert catalogue.find_workload("sharegpt_8k").workload.name == "sharegpt_8k_lengths"
    assert catalogue.find_workload("Azure-Conv-2023").workload.name == "azure_conv_2023"
    with pytest.raises(UnknownNameError, match="did you mean azure_conv_2023"):
        catalogue.find_workload("azure_conv_2024")


@pytest.mark.parametrize("entry", catalogue.models(), ids=lambda entry: entry.model.name)
def test_the_checkpoint_that_is_named_is_the_one_that_is_meant(entry: catalogue.ModelEntry) -> None:
    """Of every model by its name, without its organisation, and of tunings that have its shape."""
    name = entry.model.name
    owner, _, short = name.rpartition("/")
    assert catalogue.checkpoint_of(name) == name
    if catalogue.known_model(short) == entry.model:
        assert catalogue.checkpoint_of(short) in (name, f"{owner}/{short}")
    for tuning in (f"{owner}/{short}-Instruct", f"{owner}/{short}-chat"):
        if catalogue.known_model(tuning) == entry.model:
            assert catalogue.checkpoint_of(tuning) == tuning


@pytest.mark.parametrize(
    ("named", "checkpoint"),
    [
        ("DeepSeek-R1", "deepseek-ai/DeepSeek-R1"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-ai/DeepSeek-R1-0528"),
        ("deepseek-v3.1", "deepseek-ai/DeepSeek-V3.1"),
        ("DeepSeek-V3", "deepseek-ai/DeepSeek-V3"),
        ("Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("Llama-2-70B", "meta-llama/Llama-2-70b-hf"),
        ("Llama-2-70b-chat-hf", "meta-llama/Llama-2-70b-chat-hf"),
        ("Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        ("Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"),
        ("bloom-176b", "bigscience/bloom"),
        ("no-such-model", None),
    ],
)
def test_a_tuning_is_not_launched_as_the_model_whose_shape_it_has(named: str, checkpoint: str | None) -> None:
    assert catalogue.checkpoint_of(named) == checkpoint
