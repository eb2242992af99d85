"""Supported hardware: the GPUs on which each engine runs, by precision of weights and KV, with sources.

GPUs that are not recorded (other vendors, unlisted architectures) are not refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hetis.engines.attention import TRITON_FP8, reads_fp8_by_triton
from hetis.engines.gpus import BFLOAT16, CAPABILITIES
from hetis.formats.models.dtypes import kv_of, weights_of
from hetis.solver.cluster import GpuType
from hetis.solver.model import Kernel, ModelSpec

# Architectures that multiply MXFP4 in all layers, not in experts alone, as checkpoints of AMD's Quark have it.
# Elsewhere vLLM expands weights in every step and multiplies in 16 bits (quark/schemes/quark_ocp_mx.py: emulate).
DENSE_MXFP4 = ("CDNA4",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """The minimum compute capability for a feature."""

    capability: float  # CUDA compute capability; infinite: no GPU has it
    source: str  # where this is documented
    how: str = ""  # how it works on GPUs that do not compute in the format; empty: nothing worth noting


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """The requirements of one engine version."""

    version: str
    project: str  # the project whose repository has the sources
    engine: Least  # minimum at any precision
    weights: Mapping[str, Least]  # by precision, a name in `hetis.formats.models.dtypes.PRECISIONS`
    fp8_kv: Mapping[Kernel, Least]  # by kernels of attention
    attention: Mapping[Kernel, Least]  # likewise, in any precision


_QUANTISATION = "vllm/model_executor/layers/quantization"
_NO_FLOAT16 = "vLLM's repository, _FLOAT16_NOT_SUPPORTED_MODELS in vllm/config/model.py"
_VLLM = Support(
    version="0.32.0",
    project="vLLM",
    engine=Least(capability=7.5, source="docs/getting_started/installation/gpu.cuda.inc.md since v0.21"),
    weights={
        "fp8": Least(
            capability=7.5, source=f"{_QUANTISATION}/fp8.py", how="weights are fp8, products 16-bit (Marlin)"
        ),
        "int8": Least(capability=7.5, source=f"{_QUANTISATION}/compressed_tensors, scheme w8a8_int8"),
        "int4": Least(capability=7.5, source=f"{_QUANTISATION}/auto_awq.py; compressed-tensors by the same kernels"),
        "awq-int4": Least(capability=7.5, source=f"{_QUANTISATION}/auto_awq.py"),
        "gptq-int4": Least(capability=7.5, source=f"{_QUANTISATION}/auto_gptq.py has 6.0, vLLM itself 7.5"),
        "mxfp4": Least(capability=8.0, source=f"{_QUANTISATION}/mxfp4.py"),
        "fbgemm-fp8": Least(
            capability=8.0, source=f"{_QUANTISATION}/fbgemm_fp8.py", how="weights are fp8, products 16-bit (Marlin)"
        ),
        "nvfp4": Least(
            capability=7.5,
            source=f"{_QUANTISATION}/modelopt.py",
            how="weights are nvfp4, products 16-bit (Marlin)",
        ),
    },
    fp8_kv={
        Kernel.GROUPED: (_FP8_KV := Least(capability=8.0, source="vllm/v1/attention/backends/flashinfer.py")),
        Kernel.COMPRESSED: _FP8_KV,
        Kernel.LATENT: (
            _FP8_LATENT := Least(
                capability=TRITON_FP8, source="vllm/v1/attention/backends/mla/triton_mla.py: Triton's fp8"
            )
        ),
        Kernel.SPARSE: _FP8_LATENT,
    },
    attention={
        # FlashMLA is for Hopper and Blackwell, FlashInfer's kernels for RTX Blackwell.
        Kernel.COMPRESSED: Least(
            capability=9.0, source="vllm/models/deepseek_v4/nvidia/model.py, _select_dsv4_attn_cls"
        ),
        # FlashMLA is for Hopper and Blackwell, FlashAttention for Hopper, FlashInfer's kernels for Hopper and later.
        Kernel.SPARSE: Least(capability=9.0, source="vllm/platforms/cuda.py, _get_backend_priorities"),
    },
)  # fmt: skip
_FP8_KV_BY_TRITON = Least(capability=TRITON_FP8, source="vllm/v1/attention/backends/triton_attn.py: Triton's fp8")
_SGLANG = Support(
    version="0.5",
    project="SGLang",
    engine=Least(capability=7.5, source="docs/get_started/install.md: FlashInfer takes sm75 and above"),
    weights={
        "fp8": Least(capability=8.0, source="python/sglang/srt/layers/quantization/fp8.py"),
        "int8": Least(capability=7.5, source="python/sglang/srt/layers/quantization/w8a8_int8.py"),
        "gptq-int4": Least(capability=7.5, source="python/sglang/srt/layers/quantization/gptq.py has 6.0, SGLang 7.5"),
        "mxfp4": Least(capability=8.0, source="python/sglang/srt/layers/quantization/mxfp4.py"),
        "fbgemm-fp8": Least(capability=8.0, source="python/sglang/srt/layers/quantization/fpgemm_fp8.py"),
    },
    fp8_kv={},
    attention={},
)
SUPPORT: Mapping[str, Support] = {"vllm-hetis": _VLLM, "vllm": _VLLM, "sglang": _SGLANG}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """What is known about the plugin by which vLLM runs on an architecture other than CUDA's and ROCm's."""

    project: str
    weights: tuple[str, ...]  # precisions beside 16 bits
    kv_bytes: tuple[float, ...]
    attention: tuple[Kernel, ...]


PLUGINS = {
    "Ascend": Plugin(
        project="vllm-project/vllm-ascend at 182b75e, docs/source/user_guide/support_matrix",
        weights=("int8",),
        kv_bytes=(2.0,),
        attention=(Kernel.GROUPED, Kernel.LATENT, Kernel.SPARSE),
    ),
    "TPU": Plugin(
        # Of v5e and v6e. Weights and KV in fp8 are recommended for v7 and untested on these; MLA is untested.
        project="vllm-project/tpu-inference at b8692ff, support_matrices/release",
        weights=("int8", "awq-int4"),
        kv_bytes=(2.0,),
        attention=(Kernel.GROUPED,),
    ),
}


_BITSANDBYTES = ("bnb-int4", "bnb-int8")
DEPRECATED = ("fbgemm-fp8",)  # vLLM loads them only with ``--allow-deprecated-quantization``


def why_not_loaded(model: ModelSpec, engine: str) -> str | None:
    """Return why an engine cannot load weights quantised by the model's method, on whatever GPU; None: it can."""
    if model.weights not in _BITSANDBYTES or SUPPORT[engine] is not _VLLM:
        return None
    return (
        f"{engine} {_VLLM.version} does not load {model.weights} weights: it has no quantisation method bitsandbytes "
        f"({_VLLM.project}'s repository, {_QUANTISATION}/__init__.py)"
    )


class Refusal(NamedTuple):
    """Why an engine cannot run a model on a GPU. What the GPU has is apart, because others may lack the same."""

    needs: str
    has: str = ""  # empty: it does not depend on the GPU's compute capability
    source: str = ""  # where ``needs`` is documented, unless that says so

    def __str__(self) -> str:
        return self.needs + (f", {self.has}" if self.has else "") + (f" ({self.source})" if self.source else "")


def refusal_of(model: ModelSpec, gpu: GpuType, engine: str) -> Refusal | None:
    """Return why an engine cannot run a model on a GPU in the precision of its weights and KV.

    Return None if it can, or if nothing is recorded about it.
    """
    return next(_reasons(model, gpu, engine), None)


def remarks(model: ModelSpec, gpus: Mapping[str, GpuType], engine: str) -> Iterator[str]:
    """Yield notes on GPUs that run the model but do not compute in its precision."""
    least = SUPPORT[engine].weights.get(model.weights)
    natively = {"fp8": 8.9, "fbgemm-fp8": 8.9, "nvfp4": 10.0}.get(model.weights)
    if least is None or not least.how or natively is None:
        return
    below = [name for name, gpu in gpus.items() if CAPABILITIES.get(gpu.architecture, natively) < natively]
    if below:
        yield f"{', '.join(below)}: {least.how}"


def _reasons(model: ModelSpec, gpu: GpuType, engine: str) -> Iterator[Refusal]:
    has, support = CAPABILITIES.get(gpu.architecture), SUPPORT[engine]
    if reason := why_not_loaded(model, engine):
        yield Refusal(reason)
    if model.weights == "mxfp4" and model.experts is None and gpu.architecture not in DENSE_MXFP4:
        source = f"{support.project}'s repository, {support.weights['mxfp4'].source}"
        yield Refusal(f"mxfp4 is a format of experts, which {model.name} has not", source=source)
    if model.kv_bytes < 1:
        yield Refusal(
            f"KV in {kv_of(model)} is not modelled for {engine}, KV in 8 or 16 bits is: --kv fp8 or --kv bf16"
        )
    if (plugin := PLUGINS.get(gpu.architecture)) is not None:
        yield from _not_in_plugin(model, gpu, engine, plugin)
    if has is None:
        return
    what_it_has = f"{gpu.name} ({gpu.architecture}) has {has:g}"
    if not model.float16 and has < BFLOAT16:
        yield Refusal(
            f"{model.name} needs bfloat16 ({_NO_FLOAT16}): compute capability {BFLOAT16:g} or higher", what_it_has
        )
    fp8_kv = support.fp8_kv.get(model.kernel) if model.kv_bytes == 1 else None
    if fp8_kv is _FP8_KV and reads_fp8_by_triton(model):
        fp8_kv = _FP8_KV_BY_TRITON
    wanted = [
        (f"{weights_of(model)} weights", support.weights.get(model.weights)),
        ("fp8 KV (in 16 bits: --kv bf16)", fp8_kv),
        ("any model", support.engine),
    ]
    wanted.append((f"{model.kernel} attention", support.attention.get(model.kernel)))
    if model.kernel is Kernel.COMPRESSED and support is _VLLM and model.kv_bytes != 1:
        yield Refusal(f"the kernels that {engine} chooses for compressed attention keep KV in 8 bits: --kv fp8")
    for what, least in wanted:
        if least is not None and has < least.capability:
            yield Refusal(
                f"{engine} {support.version} needs compute capability {least.capability:g} or higher for {what}",
                what_it_has,
                f"{support.project}'s repository, {least.source}",
            )


def _not_in_plugin(model: ModelSpec, gpu: GpuType, engine: str, plugin: Plugin) -> Iterator[Refusal]:
    def unknown(what: str, known: str) -> Refusal:
        return Refusal(f"{what} is not known to run on {gpu.name}, {known}", source=plugin.project)

    if engine != "vllm":
        yield unknown(engine, "vllm is")
    if model.weights not in ("", "bf16", *plugin.weights):
        yield unknown(f"a model with {model.weights} weights", f"one with {' or '.join(('bf16', *plugin.weights))} is")
    if model.kv_bytes not in plugin.kv_bytes:
        yield unknown(f"KV in {kv_of(model)}", "KV in 16 bits is (--kv bf16)")
    if others := [kernel for kernel in model.kernels if kernel not in plugin.attention]:
        named = " and ".join(map(str, sorted(others)))
        yield unknown(f"{named} attention", f"{' and '.join(map(str, plugin.attention))} attention is")
