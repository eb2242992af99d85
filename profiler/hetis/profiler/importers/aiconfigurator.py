"""aiconfigurator-core's tables: its own parquet or text files, and the CSV extracts of 0.12.0 in ``data/profiles``.

Times are milliseconds of one kernel. In its own files a generation row has ``isl`` 1 and ``step`` cached tokens, and
every row contains the engine's name and version; for the extracts only their README does.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hetis.formats.measurements import MeasuredBy, MeasuredOp
from hetis.profiler.importers.reading import Collection, Sheet, SheetRow, Value

TOOL = "aiconfigurator-core"
_EXTRACT = partial(MeasuredBy, tool=f"{TOOL} 0.12.0", source="data/profiles", licence="Apache-2.0")
_VLLM_OF_EXTRACT = {"A100-SXM-80GB": "0.14.0", "H100-SXM-80GB": "0.24.0", "L40S": "0.24.0"}
_SGLANG_OF_EXTRACT = "0.5.10"  # the A100's second tables, recognised by a kernel name without ``vllm``

_HEADS = ("num_heads", "num_key_value_heads", "head_dim", "batch_size")
_EXPERTS = "fused experts"
_FORMS = {
    "GEMMs": ("gemm_dtype", "m", "n", "k"),
    "generation attention (extract)": (*_HEADS, "kv_len"),
    "generation attention": (*_HEADS, "isl", "step"),
    "context attention": (*_HEADS, "isl"),
    "all-reduce (extract)": ("impl", "op_name", "num_gpus", "message_elements"),
    "NCCL or custom all-reduce": ("op_name", "num_gpus", "message_size"),
    _EXPERTS: ("num_tokens", "num_experts", "topk", "moe_tp_size"),
}
_BITS = {"bfloat16": 16, "float16": 16, "fp8": 8, "nvfp4": 4}
_OTHER_WEIGHTS = ("fp8_block", "int8_wo", "int4_wo")  # weights only, or scaled by blocks
_BYTES = {"half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4, "int8": 1, "fp8": 1}

Found = tuple[MeasuredOp, str, dict[str, Value | None]]  # operator, kernel, columns but for the time


def read(sheet: Sheet, into: Collection) -> None:
    """Add every row of one table for which the cost model has an operator. Fused experts are left out."""
    form = sheet.require(_FORMS)
    time = "latency" if sheet.has("latency") and not sheet.has("latency_ms") else "latency_ms"
    sheet.require({form: (time,)})
    device = "gpu" if sheet.has("gpu") and not sheet.has("device") else "device"
    sheet.require({"any kind": (device,)})
    for row in sheet:
        gpu = row.gpu(device)
        if gpu is None:
            continue
        by, seconds = _measured_by(row, gpu), row.seconds(time, unit_s=1e-3)
        found: Found | str | None
        if form == "GEMMs":
            found = _gemm(row)
        elif "attention" in form:
            # Its own tables of prefill have the same columns as those of decode.
            found = _attention(row, decode="generation" in form and "generation" in row.text("op_name", "generation"))
        elif form == _EXPERTS:
            found = f"{Path(sheet.file).name}: fused experts have no operator of the cost model; left out"
        else:
            found = _all_reduce(row)
        if isinstance(found, str):
            into.note(gpu, by, found)
        elif found is not None:
            op, kernel, values = found
            into.add(gpu, by, op, kernel, row, time, **values, seconds=seconds)


def _gemm(row: SheetRow) -> Found | str:
    dtype = row.text("gemm_dtype")
    if dtype not in _BITS:
        why = " (weights only, or scaled by blocks)" if dtype in _OTHER_WEIGHTS else ""
        return f"GEMMs of type {dtype}{why} are left out"
    return MeasuredOp.GEMM, dtype, {**{name: row.count(name) for name in "mnk"}, "weight_bits": _BITS[dtype]}


def _attention(row: SheetRow, *, decode: bool) -> Found | str:
    for name, wanted in (("beam_width", ("1",)), ("window_size", ("0", "-1", ""))):
        if row.text(name, wanted[0]) not in wanted:
            return f"attention rows with {name} other than {wanted[0]} are left out"
    for name in ("kv_cache_dtype", "attn_dtype"):
        if row.text(name, "bfloat16") not in ("bfloat16", "float16"):
            return f"attention rows with {name} other than 16 bits are left out"
    values: dict[str, Value | None] = {
        "query_heads": row.count("num_heads"),
        "kv_heads": row.count("num_key_value_heads", least=0),
        "head_dim": row.count("head_dim"),
        "batch": row.count("batch_size"),
    }
    if values["kv_heads"] == 0:  # its own files have 0 for as many as query heads
        values["kv_heads"] = values["query_heads"]
    query_heads, kv_heads = values["query_heads"], values["kv_heads"]
    if isinstance(query_heads, int) and isinstance(kv_heads, int) and query_heads % kv_heads:
        row.refuse("num_key_value_heads", f"is {kv_heads}, must divide the {query_heads} of num_heads")
    kernel = row.text("kernel_source", "")
    if not decode:
        past = row.count("step", least=0) if row.sheet.has("step") else 0
        return MeasuredOp.PREFILL_ATTENTION, kernel, {**values, "tokens": row.count("isl"), "past_tokens": past}
    if row.sheet.has("kv_len"):
        context = row.count("kv_len")
    else:
        isl, step = row.count("isl"), row.count("step", least=0)
        context = None if isl is None or step is None else isl + step
    return MeasuredOp.DECODE_ATTENTION, kernel, {**values, "context_tokens": context}


def _all_reduce(row: SheetRow) -> Found | str | None:
    if "all_reduce" not in row.text("op_name"):
        return None
    dtype = row.text("nccl_dtype", row.text("allreduce_dtype", "half"))
    if dtype not in _BYTES:
        return f"messages of {dtype} are left out"
    # Both sizes count elements.
    extract = row.sheet.has("message_elements")
    elements = row.count("message_elements" if extract else "message_size")
    impl = row.text("impl") if extract else row.text("kernel_source", "NCCL")
    num_bytes = None if elements is None else _BYTES[dtype] * elements
    values: dict[str, Value | None] = {"num_gpus": row.count("num_gpus", least=2), "num_bytes": num_bytes, "impl": impl}
    return MeasuredOp.ALL_REDUCE, impl, values


def _measured_by(row: SheetRow, gpu: str) -> MeasuredBy:
    """Return the measurer, from the row or, for the extracts, from their README."""
    if row.sheet.has("framework", "version"):
        engine, version = row.text("framework"), row.text("version")
        return MeasuredBy(tool=TOOL, engine=engine, engine_version=version, source=TOOL, licence="Apache-2.0")
    if "vllm" not in row.text("kernel_source", "vllm"):
        return _EXTRACT(engine="SGLang", engine_version=_SGLANG_OF_EXTRACT)
    return _EXTRACT(engine="vLLM", engine_version=_VLLM_OF_EXTRACT.get(gpu, ""))
