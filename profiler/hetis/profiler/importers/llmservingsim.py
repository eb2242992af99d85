"""LLMServingSim's tables (casys-kaist/LLMServingSim, MIT): attention in ms, other operators in ns."""

from __future__ import annotations

from functools import cache

from hetis.formats import catalogue
from hetis.formats.measurements import MeasuredBy, MeasuredOp
from hetis.profiler.importers.attention import ATTENTION_COLUMNS, add_attention
from hetis.profiler.importers.collecting import Collection
from hetis.profiler.importers.gpu_names import gpu_name
from hetis.profiler.importers.reading import Rows, Sheet, require
from hetis.solver.model import ModelSpec

_BY = MeasuredBy(tool="casys-kaist/LLMServingSim", engine="vLLM", source="data/profiles", licence="MIT")
_FORMS = {"layers": ("gpu", "model", "layer", "tokens", "tp", "latency_ns"), "attention": ATTENTION_COLUMNS}
_ELEMENTWISE = ("input_layernorm", "post_layernorm", "rope", "act_fn")


def read(sheet: Sheet, into: Collection) -> None:
    """Add every row that belongs to a layer. Embeddings, LM head, inner attention and experts are left out."""
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
    if tp is None or params is None or model.moe is not None or model.linear is not None or model.gated_attention:
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
    add_attention(rows, index, gpu, _BY, "vllm_attention", into)


@cache
def _model(name: str) -> ModelSpec | None:
    try:
        return catalogue.find_model(name).model
    except catalogue.UnknownNameError:
        return None
