"""Attention rows as Sarathi-Serve's profiler writes them, published by vidur and LLMServingSim; in milliseconds."""

from __future__ import annotations

from hetis.formats.measurements import MeasuredBy, MeasuredOp
from hetis.profiler.importers.collecting import Collection
from hetis.profiler.importers.reading import Rows

ATTENTION_COLUMNS = (
    "gpu", "n_embd", "n_q_head", "n_kv_head", "tp", "batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill",
    "attn_prefill_ms", "attn_decode_ms",
)  # fmt: skip


def add_attention(rows: Rows, index: int, gpu: str, by: MeasuredBy, kernel: str, into: Collection) -> None:
    """Add one row: prefill of a chunk, or decode, on one rank."""
    heads, batch = heads_of(rows, index, "n_q_head"), rows.count(index, "batch_size")
    is_prefill = rows.flag(index, "is_prefill")
    if heads is None or batch is None or is_prefill is None:
        return
    hidden, q_heads, kv_heads, tp = heads
    shape = {"query_heads": q_heads // tp, "kv_heads": max(1, kv_heads // tp), "head_dim": hidden // q_heads}
    values: dict[str, int | None] = {"batch": batch}
    if is_prefill:
        column, op = "attn_prefill_ms", MeasuredOp.PREFILL_ATTENTION
        values["tokens"] = rows.count(index, "prefill_chunk_size")
        values["past_tokens"] = rows.count(index, "kv_cache_size", least=0)
    else:
        column, op = "attn_decode_ms", MeasuredOp.DECODE_ATTENTION
        values["context_tokens"] = rows.count(index, "kv_cache_size")
    seconds = rows.seconds(index, column, unit_s=1e-3)
    into.add(gpu, by, op, kernel, (rows, index, column), {**values, **shape, "seconds": seconds})


def heads_of(rows: Rows, index: int, q_heads_column: str) -> tuple[int, int, int, int] | None:
    """Return (hidden size, query heads, KV heads, TP degree) of a row, or None after noting the problem.

    Every head must have a whole number of dimensions, every rank a whole number of query heads.
    """
    hidden, q_heads, kv_heads, tp = (rows.count(index, name) for name in ("n_embd", q_heads_column, "n_kv_head", "tp"))
    if hidden is None or q_heads is None or kv_heads is None or tp is None:
        return None
    if hidden % q_heads:
        rows.refuse(index, q_heads_column, f"is {q_heads}, must divide the {hidden} of n_embd")
    elif q_heads % tp:
        rows.refuse(index, "tp", f"is {tp}, must divide the {q_heads} heads of {q_heads_column}")
    elif q_heads % kv_heads:
        rows.refuse(index, "n_kv_head", f"is {kv_heads}, must divide the {q_heads} heads of {q_heads_column}")
    else:
        return hidden, q_heads, kv_heads, tp
    return None
