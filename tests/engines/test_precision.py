"""The table of GPUs and precisions is complete, agrees with the installed vLLM, and refuses with reasons."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from dataclasses import replace

import pytest

from hetis.engines.attention import common_backend
from hetis.engines.gpus import GpuKind
from hetis.engines.precision import CAPABILITIES, SUPPORT, Least, remarks, why_not
from hetis.formats import catalogue
from hetis.formats.dtypes import PRECISIONS, with_precision
from hetis.solver.model import AttentionKind
from tests.formats.test_huggingface import STATED_KV
from tests.runtime.launch.vllm_python import ENVIRONMENT, PYTHON, needs_vllm

LLAMA, DEEPSEEK = catalogue.find_model("Llama-3.1-70B").model, catalogue.find_model("DeepSeek-V3").model
V100, T4, A100, L4, H100, B200, MI300X = (
    catalogue.find_gpu(name).gpu
    for name in ("V100-SXM2-32GB", "T4", "A100-SXM-80GB", "L4", "H100-SXM-80GB", "B200", "MI300X")
)


@pytest.mark.parametrize(
    ("weights", "kv", "runs_on", "not_on"),
    [
        ("fp8", None, (T4, A100, H100), (V100,)),
        ("fp8", "fp8", (A100, H100), (V100, T4)),
        ("mxfp4", None, (), (V100, A100, H100)),  # no experts
        ("awq-int4", None, (T4, A100), (V100,)),
        ("nvfp4", None, (A100, B200), (V100,)),
    ],
)
def test_what_vllm_runs(weights: str, kv: str | None, runs_on: tuple[object, ...], not_on: tuple[object, ...]) -> None:
    model = with_precision(LLAMA, weights=weights, kv=kv)
    for gpu in runs_on:
        assert why_not(model, gpu, "vllm") is None  # type: ignore[arg-type]
    for gpu in not_on:
        assert why_not(model, gpu, "vllm") is not None  # type: ignore[arg-type]


def test_refusals_say_what_is_missing_and_where_that_was_read() -> None:
    assert why_not(with_precision(LLAMA, weights="fp8"), V100, "vllm") == (
        "vllm 0.32.0 takes compute capability 7.5 for fp8 weights, V100-SXM2-32GB (Volta) has 7 "
        "(vllm/model_executor/layers/quantization/fp8.py)"
    )
    assert "mxfp4 is a format of experts" in str(why_not(with_precision(LLAMA, weights="mxfp4"), H100, "sglang"))
    assert "for fp8 KV (in 16 bits: --kv bf16), T4" in str(why_not(with_precision(LLAMA, kv="fp8"), T4, "vllm"))
    for gpu in (B200, MI300X):
        assert why_not(replace(LLAMA, kv_bytes=0.5625), gpu, "sglang") == (
            "KV in nvfp4 is not modelled for sglang, KV in 8 or 16 bits is: --kv fp8 or --kv bf16"
        )


def test_fp8_kv_of_latent_attention_takes_newer_gpus() -> None:
    model = with_precision(DEEPSEEK, kv="fp8")
    assert why_not(model, A100, "vllm") is not None
    assert why_not(model, L4, "vllm") is None
    assert why_not(replace(model, kv_bytes=2.0), A100, "vllm") is None


def test_what_nobody_recorded_is_not_refused() -> None:
    assert why_not(with_precision(LLAMA, weights="fp8"), MI300X, "vllm") is None


def test_gpus_that_only_keep_the_format_are_told() -> None:
    model = with_precision(LLAMA, weights="fp8")
    gpus = {"A100": A100, "H100": H100}
    assert list(remarks(model, gpus, "vllm")) == ["A100: weights are fp8, products 16-bit (Marlin)"]
    assert not list(remarks(LLAMA, gpus, "vllm"))


def test_models_that_overflow_in_float16_need_gpus_with_bfloat16() -> None:
    gemma, t4 = catalogue.find_model("gemma-2-9b").model, catalogue.find_gpu("T4").gpu
    assert not gemma.float16
    assert "needs bfloat16" in (why_not(gemma, t4, "vllm") or "")
    assert why_not(gemma, A100, "vllm") is None
    assert why_not(LLAMA, t4, "vllm") is None


def test_every_row_has_a_source() -> None:
    for support in SUPPORT.values():
        rows = [support.engine, *support.weights.values(), *support.fp8_kv.values()]
        assert all(row.source and row.capability in CAPABILITIES.values() for row in rows)
        assert support.weights.keys() <= PRECISIONS.keys()
        assert set(support.fp8_kv) <= set(AttentionKind)
    assert {entry.gpu.architecture for entry in catalogue.gpus() if entry.gpu.vendor == "NVIDIA"} <= CAPABILITIES.keys()


AT = (7.5, 8.0, 8.9, 9.0, 10.0, 12.0)  # capabilities
_PROGRAM = """
import json, sys, types
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("kernels of CUDA, which nothing here calls")
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms.cuda import _get_backend_priorities
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import get_kv_cache_quant_algo_string
from vllm.v1.attention.backends.registry import AttentionBackendEnum

said = {"kv": [get_kv_cache_quant_algo_string(one) for one in json.load(sys.stdin)], "capabilities": {}}
for name in ("fp8", "mxfp4", "modelopt_fp4", "awq", "gptq"):
    try:
        said["capabilities"][name] = get_quantization_config(name).get_min_capability()
    except Exception:
        pass
at = [DeviceCapability(int(one), round(one % 1 * 10)) for one in json.loads(sys.argv[1])]
said["order"] = [[[one.name for one in _get_backend_priorities(mla, c)] for c in at] for mla in (False, True)]
said["runs"] = {}
for one in AttentionBackendEnum:
    try:
        said["runs"][one.name] = [one.get_class().supports_compute_capability(c) for c in at]
    except Exception:
        pass  # what it imports is not installed
print("SAID", json.dumps(said))
"""


def assert_backends(order: list[list[list[str]]], runs: dict[str, list[bool]]) -> None:
    """Assert that vLLM has the backends that we tell it, on all the GPUs of which we think so.

    Where we tell it nothing, its first choice is the same on all of them, and where we know none, there is none.
    Backends whose libraries are not installed are left out: they do not say where they run.
    """
    assert {"FLASH_ATTN", "TRITON_ATTN", "TRITON_MLA", "FLASHMLA_SPARSE"} <= runs.keys()
    sparse = {name for name in runs if "SPARSE" in name}
    for model, kv in itertools.product((entry.model for entry in catalogue.models()), ("bf16", "fp8")):
        posed, names = with_precision(model, kv=kv), order[model.mla is not None]
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
def test_the_tables_and_the_kv_of_checkpoints_are_what_the_installed_vllm_says() -> None:
    stated = [(one, dtype) for one, dtype in STATED_KV if one["quant_method"] == "modelopt"]
    done = subprocess.run(
        [str(PYTHON), "-c", _PROGRAM, json.dumps(AT)], input=json.dumps([one for one, _ in stated]), env=ENVIRONMENT,
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    [line] = re.findall("^SAID (.*)$", done.stdout, re.MULTILINE)
    found = json.loads(line)
    assert_backends(found["order"], found["runs"])
    kv, said = found["kv"], found["capabilities"]
    assert [(one or "auto").removesuffix("_e4m3") for one in kv] == [dtype for _, dtype in stated]
    names = {"fp8": "fp8", "mxfp4": "mxfp4", "modelopt_fp4": "nvfp4", "awq": "awq-int4", "gptq": "gptq-int4"}
    assert said
    rows: dict[str, Least] = dict(SUPPORT["vllm"].weights)
    for method, capability in said.items():
        assert rows[names[method]].capability == max(capability / 10, SUPPORT["vllm"].engine.capability), method
