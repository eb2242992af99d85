"""Derives the kernels of engines that the profiler ships from the engines' published tables.

    python -m tools.engine_kernels experts|latent|linear --tables DIR --out FILE

``DIR`` is ``systems/data`` in the package aiconfigurator-core 0.12.0 (Apache-2.0). *experts* are fused experts of
``SYSTEM/moe``, whose rows have skewed routing. *latent* are whole modules of DeepSeek-V3's attention in ``SYSTEM/mla``:
the projections around the latents, the products that are absorbed into them, and attention itself. *linear* are the
two kernels of Qwen3.5's gated delta rule in ``SYSTEM/linear_attention``. The same tables always give the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from hetis.formats import catalogue
from hetis.formats.files import write_atomically
from hetis.formats.models.dtypes import BYTES_PER_PARAMETER
from hetis.profiler import engine_tables
from hetis.profiler.experts import TRITON_NAME, ExpertKernel, peak_flops
from hetis.profiler.fit.layers import COLD_RATIO
from hetis.profiler.fit.points import CACHE_BYTES
from hetis.profiler.fitting import fit_pieces, rounded
from hetis.profiler.latent import MODEL as LATENT_MODEL
from hetis.profiler.latent import LatentKernel
from hetis.profiler.linear import DeltaRuleKernel, linear_model
from hetis.profiler.roofline import matrix_flops
from hetis.solver.cluster import GpuType
from hetis.solver.model import Kernel, ModelSpec
from hetis.solver.profile import Op

PUBLISHER = "aiconfigurator-core 0.12.0 (Apache-2.0)"
SYSTEMS = {  # their names, and ours for their GPUs
    "h100_sxm": "H100-SXM-80GB", "h200_sxm": "H200-SXM-141GB", "b200_sxm": "B200-SXM-180GB",
    "a100_sxm": "A100-SXM-80GB", "l40s": "L40S",
    "rtx_pro_6000_server": "RTX-PRO-6000-Server-96GB", "b60": "Arc-Pro-B60-24GB",
}  # fmt: skip

DESCRIPTION = "Derive the kernels of engines that the profiler ships from published tables."


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file of a kind of kernels, and return the exit status."""
    kinds: dict[str, Callable[[Path], Iterable[Any]]] = {"experts": experts, "latent": latent, "linear": linear}
    parser = argparse.ArgumentParser(
        prog="python -m tools.engine_kernels", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--tables", type=Path, required=True, help="systems/data of aiconfigurator-core")
    parser.add_argument("--out", type=Path, help="file to write instead of the package's")
    options = parser.parse_args(arguments)
    try:
        kernels = [asdict(kernel) for kernel in kinds[options.kind](options.tables)]
    except OSError as error:
        print(f"{options.kind}: {error}", file=sys.stderr)
        return 1
    text = ",\n".join(json.dumps(kernel) for kernel in kernels)
    out = options.out or Path(engine_tables.__file__).with_name(f"{options.kind}.json")
    made_by = f"python -m tools.engine_kernels {options.kind}"
    write_atomically(out, f'{{"made_by": "{made_by}", "kernels": [\n{text}\n]}}\n')
    return 0


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table. Raises OSError if it cannot be read."""
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


# --- experts

_NEWEST = {"vllm": "0.24.0", "trtllm": "1.3.0rc20", "sglang": "0.5.14"}
_EXPERT_VERSIONS = {
    **dict.fromkeys(("b200_sxm", "h100_sxm", "l40s", "rtx_pro_6000_server"), _NEWEST),
    "b60": {"vllm": "0.26.0"},
    "a100_sxm": {"vllm": "0.14.0", "trtllm": "1.0.0", "sglang": "0.5.10"},
}
_EXPERT_FORMATS = {"bfloat16": "bfloat16", "fp8_block": "fp8", "nvfp4": "nvfp4", "int4_wo": "int4"}
# The kernels of gpt-oss; other models of these tables have others. TensorRT-LLM's on Blackwell quantise activations to
# eight bits. Those in SGLang's tables are not the ones that SGLang chooses: its MXFP4 experts stay dense products.
_MXFP4 = {
    **{(system, "vllm"): "w4a16_mxfp4" for system in ("b200_sxm", "h100_sxm", "l40s", "rtx_pro_6000_server", "b60")},
    **{(system, "trtllm"): "w4a8_mxfp4_mxfp8" for system in ("b200_sxm", "rtx_pro_6000_server")},
}
_MXFP4_HIDDEN = 2880  # gpt-oss's
# Further tables, as system, engine, its name here, version and formats. Triton's kernel for FP8 in blocks of 128, which
# vLLM's own tables have until 0.19.0, is what it runs on Blackwell without those of FlashInfer and DeepGEMM. TensorRT-
# LLM's table of H100 lacks the larger gpt-oss on one rank.
_FURTHER = (
    ("b200_sxm", "vllm", TRITON_NAME, "0.19.0", {"fp8_block": "fp8"}),
    ("h200_sxm", "trtllm", "trtllm", "1.3.0rc20", {"w4a16_mxfp4": "mxfp4"}),
)
_ROUTING = "power_law_1.2"  # one of three in the tables: what their publisher assumes for most models
_MOST_EXPERT_TOKENS, _MOST_RANKS = 16384, 16
_RANKS = (1, 2, 4, 8)
_ACTIVATION_BYTES = 2
_LEAST_POINTS = 54


def experts(tables: Path) -> Iterator[ExpertKernel]:
    """Yield every kernel for which the tables have enough points."""
    requested = [
        (system, engine, engine, version, _EXPERT_FORMATS | _mxfp4(system, engine))
        for system, versions in _EXPERT_VERSIONS.items()
        for engine, version in versions.items()
    ]
    for system, engine, kernel_engine, version, formats in (*requested, *_FURTHER):
        name = SYSTEMS[system]
        gpu = catalogue.find_gpu(name).gpu
        rows = rows_in(tables / system / "moe" / engine / version / "moe_perf.parquet")
        for dtype, whole in itertools.product(formats, (False, True)):
            origin = f"{PUBLISHER}, {engine} {version} on {name}, {dtype} experts"
            points = _expert_points(rows, dtype, whole=whole)
            parts = {r: {key: s for key, s in points.items() if r in (None, key[-1])} for r in (None, *_RANKS)}
            for ranks, some in parts.items():
                if len(some) >= _LEAST_POINTS:
                    yield _expert_kernel(
                        some, gpu, engine=kernel_engine, weights=formats[dtype], whole=whole, ranks=ranks,
                        origin=origin,
                    )  # fmt: skip


def _mxfp4(system: str, engine: str) -> dict[str, str]:
    dtype = _MXFP4.get((system, engine))
    return {} if dtype is None else {dtype: "mxfp4"}


Point = tuple[float, float, float, float, float, float]  # tokens, hidden, width, experts per token, experts, ranks


def _expert_points(rows: Sequence[Mapping[str, Any]], dtype: str, *, whole: bool) -> dict[Point, float]:
    """Return the seconds of experts that are whole or sliced, by the fastest kernel.

    Ranks share slices (`moe_tp_size`) or whole experts (`moe_ep_size`); rows with both are left out.
    """
    shared_by, other = ("moe_ep_size", "moe_tp_size") if whole else ("moe_tp_size", "moe_ep_size")
    best: dict[Point, float] = {}
    for row in rows:
        if row["moe_dtype"] != dtype or row["distribution"] != _ROUTING or row[other] != 1:
            continue
        if "min_latency" in row["kernel_source"] or (whole and row[shared_by] == 1):  # rows of a separate backend
            continue
        if "mxfp4" in dtype and row["hidden_size"] != _MXFP4_HIDDEN:
            continue
        if row["num_tokens"] > _MOST_EXPERT_TOKENS or row["topk"] < 2 or row[shared_by] > _MOST_RANKS:
            continue
        names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", shared_by)
        tokens, hidden, width, chosen, experts, ranks = (float(row[name]) for name in names)
        key = tokens, hidden, width, chosen, experts, ranks
        best[key] = min(best.get(key, float("inf")), row["latency"] * 1e-3)
    return best


def _expert_kernel(
    points: Mapping[Point, float], gpu: GpuType, *, engine: str, weights: str, whole: bool, ranks: int | None,
    origin: str,
) -> ExpertKernel:  # fmt: skip
    ordered = sorted(points.items())
    tokens, hidden, width, chosen, experts, on = np.array([key for key, _ in ordered]).T
    seconds = np.array([value for _, value in ordered])
    expert = 3.0 * hidden * width / on
    flops_s = 2.0 * tokens * chosen * expert / peak_flops(gpu, weights)
    read = experts * (1.0 - (1.0 - chosen / experts) ** tokens)  # the expectation in `ModelSpec.touched_experts`
    weight_bytes = read * expert * BYTES_PER_PARAMETER[weights]
    moved = 4.0 * tokens * chosen * (hidden + width / on) * _ACTIVATION_BYTES  # `ModelSpec.expert_activation_bytes`
    bytes_s = (weight_bytes + moved) / gpu.mem_bytes_per_s
    # When called repeatedly, experts that fit are read from the cache; serving reads them from memory.
    cold_s = weight_bytes / gpu.mem_bytes_per_s / COLD_RATIO
    seconds = np.where(weight_bytes < CACHE_BYTES[gpu.name], np.maximum(seconds, cold_s), seconds)
    found = fit_pieces(np.stack([np.ones(len(seconds)), flops_s, bytes_s], axis=1), seconds, num_pieces=1)
    fixed_s, flop, byte = found.pieces[0]
    return ExpertKernel(
        architecture=gpu.architecture, engine=engine, weights=weights, whole=whole, ranks=ranks,
        fixed_s=rounded(fixed_s), flop=rounded(flop), byte=rounded(byte), num_points=len(seconds),
        mape=rounded(found.mape), origin=origin,
    )  # fmt: skip


# --- latent attention

# vLLM's kernel is Triton's on GPUs without one made for them, and SGLang's, too. There TensorRT-LLM's takes as long for
# one request as for 16, which no sum of FLOPs and bytes expresses; its table is left out. a100_sxm has no such tables.
_LATENT_VERSIONS = {
    **{system: {"vllm": "0.24.0", "trtllm": "1.3.0rc20"} for system in ("h100_sxm", "b200_sxm")},
    **{system: {"vllm": "0.24.0"} for system in ("rtx_pro_6000_server", "l40s")},
}
_OPS = {Op.DECODE_ATTENTION: "generation", Op.PREFILL_ATTENTION: "context"}
_LATENT_FORMATS = {"bfloat16": "bfloat16", "fp8_block": "fp8", "nvfp4": "nvfp4"}
_KV_BYTES = {"bfloat16": 2.0, "fp8": 1.0}
_LEAST_HEADS, _MOST_LATENT_TOKENS, _MOST_CONTEXT = 8, 32768, 32768  # limits per rank, iteration and request


def latent(tables: Path) -> Iterator[LatentKernel]:
    """Yield the kernel of every system, engine and phase that is measured."""
    model = catalogue.find_model(LATENT_MODEL).model
    for system, versions in _LATENT_VERSIONS.items():
        name = SYSTEMS[system]
        gpu = catalogue.find_gpu(name).gpu
        for (engine, version), (op, phase) in itertools.product(versions.items(), _OPS.items()):
            path = tables / system / "mla" / engine / version / f"mla_{phase}_module_perf.parquet"
            rows = [row for row in rows_in(path) if _is_used(row, op)]
            origin = f"{PUBLISHER}, {engine} {version} on {name}, MLA {phase}"
            yield _latent_kernel(rows, gpu, model, op=op, engine=engine, origin=origin)


def _is_used(row: Mapping[str, Any], op: Op) -> bool:
    tokens = row["batch_size"] * row["isl"]
    return (
        row["model"] == LATENT_MODEL
        and row["gemm_type"] in _LATENT_FORMATS
        and row["num_heads"] >= _LEAST_HEADS
        and tokens <= _MOST_LATENT_TOKENS
        and row["step"] <= _MOST_CONTEXT
        and (op is Op.DECODE_ATTENTION or row["step"] == 0)
    )


def _latent_kernel(
    rows: Sequence[Mapping[str, Any]], gpu: GpuType, model: ModelSpec, *, op: Op, engine: str, origin: str
) -> LatentKernel:  # fmt: skip
    features = np.array([_latent_features(row, gpu, model, op) for row in rows])
    seconds = np.array([row["latency"] * 1e-3 for row in rows])
    found = fit_pieces(features, seconds, num_pieces=1)
    fixed_s, _, _, flop, *others = map(rounded, found.pieces[0])
    byte, token, head = (*others, 0.0, 0.0) if op is Op.DECODE_ATTENTION else (0.0, *others)
    return LatentKernel(
        architecture=gpu.architecture, engine=engine, op=op.value, fixed_s=fixed_s, flop=flop, byte=byte, token=token,
        head=head, num_points=len(rows), mape=rounded(found.mape), origin=origin,
    )  # fmt: skip


def _latent_features(row: Mapping[str, Any], gpu: GpuType, model: ModelSpec, op: Op) -> tuple[float, ...]:
    """Return 1, and the seconds at the peaks of projections' FLOPs and bytes, of attention's FLOPs, and of its bytes.

    In decode these are of KV; in prefill one per token, and one per token and query head.
    """
    heads, batch, length = row["num_heads"], row["batch_size"], row["isl"]
    weights, bandwidth = BYTES_PER_PARAMETER[_LATENT_FORMATS[row["gemm_type"]]], gpu.mem_bytes_per_s
    params, tokens = model.attention_params() * heads / model.q_heads, batch * length
    projected = 1.0, 2.0 * tokens * params / matrix_flops(gpu, weights), params * weights / bandwidth
    if op is Op.DECODE_ATTENTION:
        context, kv_bytes = row["step"] + length, _KV_BYTES[row["kv_cache_dtype"]]
        read = batch * context * replace(model, kv_bytes=kv_bytes).kv_bytes_per_token_group()
        flops = batch * model.decode_attention_flops(float(context), heads)
        return *projected, flops / gpu.fp16_flops, read / bandwidth
    flops = model.attention_flops(tokens * (length + 1) / 2, heads)
    return *projected, flops / gpu.fp16_flops, tokens / bandwidth, tokens * heads / bandwidth


# --- the gated delta rule

_VALUE_HEADS = 64  # of the model
_LINEAR_SYSTEMS = ("h100_sxm", "b200_sxm", "l40s", "rtx_pro_6000_server")  # the table of a100_sxm lacks the rule itself
_LINEAR_VERSIONS = {"vllm": "0.24.0", "sglang": "0.5.14", "trtllm": "1.3.0rc20"}
_CONVOLUTION, _RULE = "causal_conv1d", "chunk_gated_delta_rule"  # how the names of their kernels begin
_LEAST_PROMPT_TOKENS, _MOST_PROMPT_TOKENS = 16, 32768


def linear(tables: Path) -> Iterator[DeltaRuleKernel]:
    """Yield the kernel of every system and engine."""
    rule = next(mixer for mixer, _ in linear_model().mixers if mixer.kernel is Kernel.RECURRENT)
    for system, (engine, version) in itertools.product(_LINEAR_SYSTEMS, _LINEAR_VERSIONS.items()):
        gpu = catalogue.find_gpu(SYSTEMS[system]).gpu
        rows = rows_in(tables / system / "linear_attention" / engine / version / "gdn_perf.parquet")
        prompts = list(_prompts(rows))
        head_s = rule.token_flops() / _VALUE_HEADS / gpu.fp16_flops
        features = np.array([(1.0, tokens * 1e-9, tokens * heads * head_s) for tokens, heads, _ in prompts])
        found = fit_pieces(features, np.array([seconds for *_, seconds in prompts]), num_pieces=1)
        fixed_s, token_ns, flop = found.pieces[0]
        yield DeltaRuleKernel(
            architecture=gpu.architecture, engine=engine, fixed_s=rounded(fixed_s), token_s=rounded(token_ns * 1e-9),
            flop=rounded(flop), num_points=len(prompts), mape=rounded(found.mape),
            origin=f"{PUBLISHER}, {engine} {version} on {gpu.name}, gated delta rule",
        )  # fmt: skip


def _prompts(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, float]]:
    """Yield tokens, value heads of a rank, and seconds of both kernels, for single prompts."""
    seconds = defaultdict[tuple[str, int, int], dict[str, float]](dict)
    for row in rows:
        tokens = row["seq_len"]
        if (
            row["phase"] == "context"
            and row["batch_size"] == 1
            and _LEAST_PROMPT_TOKENS <= tokens <= _MOST_PROMPT_TOKENS
        ):
            kernel = next(name for name in (_CONVOLUTION, _RULE) if row["kernel_source"].startswith(name))
            seconds[row["model_name"], row["num_v_heads"], tokens][kernel] = row["latency"] * 1e-3
    for (_, heads, tokens), kernels in sorted(seconds.items()):
        if len(kernels) == 2:
            yield tokens, heads, sum(kernels.values())


if __name__ == "__main__":
    sys.exit(main())
