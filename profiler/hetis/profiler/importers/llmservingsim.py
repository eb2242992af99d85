"""LLMServingSim's tables (casys-kaist/LLMServingSim, MIT): attention in ms, other operators in ns."""

from __future__ import annotations

from functools import cache

from hetis.formats import catalogue
from hetis.formats.measurements import MeasuredBy, MeasuredOp
from hetis.profiler.importers.collecting import Collection
from hetis.profiler.importers.gpu_names import gpu_name
from hetis.profiler.importers.reading import Rows, Sheet, require
from hetis.solver.model import ModelSpec

_BY = MeasuredBy(tool="casys-kaist/LLMServingSim", engine="vLLM", source="data/profiles", licence="MIT")
_ATTENTION = (
    "gpu", "n_embd", "n_q_head", "n_kv_head", "tp", "batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill",
    "attn_prefill_ms", "attn_decode_ms",
)  # fmt: skip
_FORMS = {"layers": ("gpu", "model", "layer", "tokens", "tp", "latency_ns"), "attention": _ATTENTION}
_ELEMENTWISE = ("input_layernorm", "post_layernorm", "rope", "act_fn")


def read(sheet: Sheet, into: Collection) -> None:
    """Adds every row that belongs to a layer; embeddings, LM head, attention inside and experts are left out."""
    rows = Rows(sheet)
    add = {"layers": _layer, "attention": _attention}[require(sheet, _FORMS)]
    for index in rows:
        gpu = gpu_name(rows, index, "gpu")
        if gpu is not None:
            add(rows, index, gpu, into)
    rows.finish()


def _layer(rows: Rows, index: int, gpu: str, into: Collection) -> None:
    model, op, tp = _model(rows.text(index, "model")), rows.text(index, "layer"), rows.count(index, "tp")
    if model is None:
        rows.refuse(index, "model", f"is {rows.text(index, 'model')!r}, no model of the catalogue")
        return
    seconds, tokens = rows.seconds(index, "latency_ns", unit_s=1e-9), rows.count(index, "tokens")
    params = _params(model, op)
    if tp is None or params is None or model.moe is not None:
        if tp is not None:
            into.note(gpu, _BY, "experts, embeddings, LM head and the attention among the layers are left out")
        return
    into.add(
        gpu, _BY, MeasuredOp.LAYER, "torch", (rows, index, "latency_ns"),
        {
            "model": model.name, "op": op, "tp": tp, "tokens": tokens, "hidden": model.hidden, "params": params // tp,
            "weight_bits": 16, "seconds": seconds,
        },
    )  # fmt: skip


def _params(model: ModelSpec, op: str) -> int | None:
    if op in _ELEMENTWISE:
        return 0
    heads = {"q_proj": model.q_heads, "k_proj": model.kv_heads, "v_proj": model.kv_heads, "o_proj": model.q_heads}
    if op in heads:
        return heads[op] * model.head_dim * model.hidden
    return model.intermediate * model.hidden if op in ("gate_proj", "up_proj", "down_proj") else None


def _attention(rows: Rows, index: int, gpu: str, into: Collection) -> None:
    names = ("n_embd", "n_q_head", "n_kv_head", "tp", "batch_size")
    shape = [rows.count(index, name) for name in names]
    if None in shape:
        return
    hidden, q_heads, kv_heads, tp, batch = (value for value in shape if value is not None)
    heads = {"query_heads": q_heads // tp, "kv_heads": max(1, kv_heads // tp), "head_dim": hidden // q_heads}
    values: dict[str, int | None]
    if rows.text(index, "is_prefill") == "True":
        column, op = "attn_prefill_ms", MeasuredOp.PREFILL_ATTENTION
        past = rows.count(index, "kv_cache_size", least=0)
        values = {"batch": batch, "tokens": rows.count(index, "prefill_chunk_size"), "past_tokens": past}
    else:
        column, op = "attn_decode_ms", MeasuredOp.DECODE_ATTENTION
        values = {"batch": batch, "context_tokens": rows.count(index, "kv_cache_size")}
    seconds = rows.seconds(index, column, unit_s=1e-3)
    into.add(gpu, _BY, op, "vllm_attention", (rows, index, column), {**values, **heads, "seconds": seconds})


@cache
def _model(name: str) -> ModelSpec | None:
    try:
        return catalogue.find_model(name).model
    except catalogue.UnknownNameError:
        return None
