"""What the calibrated rooflines say about tables they were not fitted to: other kernels, experts, whole engines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from hetis.profiler import tables
from hetis.profiler.efficiency import Efficiencies, OpEfficiency
from hetis.profiler.tables import A40, A100, H100, L40S, MeasuredGpu, read_rows
from hetis.solver.model import AttentionKind, ModelSpec

LLAMA_2_70B = ModelSpec(
    name="Llama-2-70B",
    num_layers=80,
    hidden=8192,
    intermediate=28672,
    q_heads=64,
    kv_heads=8,
    head_dim=128,
    vocab=32000,
    attention=AttentionKind.GQA,
)
_ARCHITECTURES = {A100.name: "Ampere", A40.name: "Ampere", H100.name: "Hopper", L40S.name: "Ada"}
_SPLITWISE = {"a100-80gb": A100, "h100-80gb": H100}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Measured against predicted; ``ratio`` is the median of measured / predicted."""

    what: str
    num_points: int
    ratio: float
    mape: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTime:
    """Seconds of one decode step of a whole engine with one request."""

    gpu: str
    tp: int
    measured_s: float
    predicted_s: float


def comparisons(efficiencies: Efficiencies, folder: Path) -> Iterator[Comparison]:
    """Every table that has a counterpart in the model and took no part in the fit."""

    def op(gpu: MeasuredGpu, name: str) -> OpEfficiency:
        return efficiencies.architectures[_ARCHITECTURES[gpu.name]].ops[name]

    yield _compare("A100 decode attention, SGLang 0.5.10", A100, op(A100, "decode_attention"), _sglang_decode(folder))
    yield _compare(
        "A100 decode attention, vidur (2024 kernel)", A100, op(A100, "decode_attention"), _vidur_decode(folder)
    )
    yield _compare(
        "A100 prefill chunks over a past, vidur (2024 kernel)",
        A100,
        op(A100, "prefill_attention"),
        _vidur_prefill(folder),
    )
    for gpu in (A100, H100, L40S):
        what = f"{gpu.name} decode attention, KV within twice the cache"
        yield _compare_points(what, op(gpu, "decode_attention"), tables.decode_points(folder, gpu, warm=True))
    for gpu in (A100, H100, L40S):
        for what, few in (("up to 64 tokens", True), ("above 64 tokens", False)):
            rows = [work for tokens, *work in _experts(folder, gpu) if (tokens <= 64) == few]
            yield _compare(f"{gpu.name} fused experts, bf16, {what}", gpu, op(gpu, "dense"), rows)


def splitwise_token_times(efficiencies: Efficiencies, folder: Path) -> list[TokenTime]:
    """Llama-2-70B, one request of 512 prompt and 128 output tokens, by tensor parallelism on NVLink."""
    columns = ("model", "hardware", "prompt_size", "batch_size", "token_size", "token_time_ms", "tensor_parallel")
    measured = defaultdict(list)
    for row in read_rows(folder, "splitwise_e2e.csv.gz", *columns):
        if row["model"] != "llama2-70b" or row["hardware"] not in _SPLITWISE:
            continue
        if (row["prompt_size"], row["batch_size"], row["token_size"]) == ("512", "1", "128"):
            measured[row["hardware"], int(row["tensor_parallel"])].append(float(row["token_time_ms"]) / 1e3)
    return [
        TokenTime(
            gpu=_SPLITWISE[hardware].name,
            tp=tp,
            measured_s=median(times),
            predicted_s=_token_s(efficiencies, _SPLITWISE[hardware], tp, context=512 + 64),
        )
        for (hardware, tp), times in sorted(measured.items())
    ]


def seconds(
    op: OpEfficiency,
    gpu: MeasuredGpu,
    *,
    flops: float = 0.0,
    num_bytes: float = 0.0,
    tokens: float = 0.0,
    heads: float = 0.0,
    wire_s: float = 0.0,
) -> float:
    """The operator's time on ``gpu``."""
    pieces = [piece.at(flops=gpu.flops, bytes_per_s=gpu.bytes_per_s) for piece in op.pieces]
    return max(p.seconds(flops=flops, num_bytes=num_bytes, tokens=tokens, heads=heads, wire_s=wire_s) for p in pieces)


def _token_s(efficiencies: Efficiencies, gpu: MeasuredGpu, tp: int, *, context: int) -> float:
    """docs/cost-model.md for one decode token, one stage, no pool."""
    ops, model = efficiencies.architectures[_ARCHITECTURES[gpu.name]].ops, LLAMA_2_70B
    params, message = model.dense_layer_params() / tp, model.hidden * 2.0
    groups = max(1.0, model.kv_heads / tp)
    heads = model.q_heads / tp
    dense = seconds(ops["dense"], gpu, flops=2 * params, num_bytes=2 * params + 8 * model.hidden * 2, tokens=1)
    wire_s = 2 * (tp - 1) / tp * message / gpu.link_bytes_per_s
    reduce = seconds(ops["all_reduce_nvlink"], gpu, num_bytes=message, tokens=1, wire_s=wire_s) if tp > 1 else 0.0
    attention = seconds(
        ops["decode_attention"],
        gpu,
        heads=heads,
        num_bytes=context * groups * model.kv_bytes_per_token_group(),
        flops=model.decode_attention_flops(context, heads),
    )
    head = model.embedding_params / tp
    last = seconds(ops["dense"], gpu, flops=2 * head, num_bytes=2 * head, tokens=1)
    return model.num_layers * (dense + 2 * reduce + attention) + last + efficiencies.links["step"].pieces[0].fixed_s


def _compare(what: str, gpu: MeasuredGpu, op: OpEfficiency, rows: list[list[float]]) -> Comparison:
    """rows: (FLOPs, bytes, tokens, query heads, measured seconds)."""
    pairs = [
        (measured, seconds(op, gpu, flops=flops, num_bytes=num_bytes, tokens=tokens, heads=heads))
        for flops, num_bytes, tokens, heads, measured in rows
    ]
    return _comparison(what, pairs)


def _compare_points(what: str, op: OpEfficiency, points: tables.Points) -> Comparison:
    """Points of `tables.decode_points`, whose features are relative already."""
    pairs = []
    for (_, flop, byte, head), measured in zip(points.features.tolist(), points.seconds.tolist(), strict=True):
        value = max(p.fixed_s + p.flop * flop + p.byte * byte + p.head_bytes * head for p in op.pieces)
        pairs.append((measured, value))
    return _comparison(what, pairs)


def _comparison(what: str, pairs: list[tuple[float, float]]) -> Comparison:
    return Comparison(
        what=what,
        num_points=len(pairs),
        ratio=median(measured / predicted for measured, predicted in pairs),
        mape=fmean(abs(predicted / measured - 1) for measured, predicted in pairs),
    )


def _sglang_decode(folder: Path) -> list[list[float]]:
    rows = []
    name = "aic_a100_sxm_generation_attention_sglang.csv.gz"
    for row in read_rows(folder, name, "batch_size", "num_heads", "num_key_value_heads", "kv_len", "latency_ms"):
        batch, context, heads = int(row["batch_size"]), int(row["kv_len"]), int(row["num_heads"])
        if 4 <= batch <= 256 and 256 <= context <= 16384 and 4 <= heads <= 64:
            tokens = float(batch * context)
            kv_bytes = 512.0 * tokens * int(row["num_key_value_heads"])
            rows.append([512.0 * tokens * heads, kv_bytes, 0.0, float(batch * heads), float(row["latency_ms"]) / 1e3])
    return rows


def _vidur_decode(folder: Path) -> list[list[float]]:
    rows = []
    for row in read_rows(folder, "vidur_attention_a100.csv.gz", "batch_size", "kv_cache_size", "attn_decode_ms"):
        batch, context = int(row["batch_size"]), int(row["kv_cache_size"])
        if row["is_prefill"] == "False" and batch >= 4 and context >= 256:
            tokens = float(batch * context)  # a rank at TP 2: 32 query and 4 KV heads
            rows.append(
                [512.0 * tokens * 32, 512.0 * tokens * 4, 0.0, 32.0 * batch, float(row["attn_decode_ms"]) / 1e3]
            )
    return rows


def _vidur_prefill(folder: Path) -> list[list[float]]:
    rows = []
    for row in read_rows(
        folder, "vidur_attention_a100.csv.gz", "prefill_chunk_size", "kv_cache_size", "attn_prefill_ms"
    ):
        chunk, past = int(row["prefill_chunk_size"]), int(row["kv_cache_size"])
        if row["is_prefill"] == "True" and chunk >= 256:
            pairs = chunk * (past + chunk / 2)
            rows.append([512.0 * pairs * 32, 0.0, float(chunk), 0.0, float(row["attn_prefill_ms"]) / 1e3])
    return rows


def _experts(folder: Path, gpu: MeasuredGpu) -> Iterator[list[float]]:
    """Tokens, then the work of a fused expert layer: an attention-free layer, so its time lacks the projections'."""
    columns = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    for row in read_rows(folder, f"{tables.AIC_PREFIX[gpu.name]}_moe.csv.gz", *columns, "distribution", "latency_ms"):
        tokens, hidden, inner, topk, experts, tp, ep = (int(row[column]) for column in columns)
        if ep != 1 or tokens > 8192 or row["distribution"] != "power_law_1.01":
            continue
        params = 3.0 * hidden * inner / tp
        touched = experts * (1.0 - (1.0 - topk / experts) ** tokens)
        num_bytes = 2.0 * touched * params + 16.0 * hidden * tokens
        yield [tokens, 2.0 * tokens * topk * params, num_bytes, tokens, 0.0, float(row["latency_ms"]) / 1e3]
