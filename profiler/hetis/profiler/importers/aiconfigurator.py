"""aiconfigurator-core's tables: its own parquet or text files, and the CSV extracts of 0.12.0 in ``data/profiles``.

Times are milliseconds of one kernel. In its own files a generation row has ``isl`` 1 and ``step`` cached tokens, and
every row contains the engine's name and version; for the extracts only their README does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hetis.formats.measurements import MeasuredBy, MeasuredOp
from hetis.profiler.importers.collecting import Collection
from hetis.profiler.importers.gpu_names import gpu_name
from hetis.profiler.importers.reading import Rows, Sheet, require

TOOL = "aiconfigurator-core"
_EXTRACT = MeasuredBy(tool=f"{TOOL} 0.12.0", engine="vLLM", licence="Apache-2.0")
_VLLM_OF_EXTRACT = {"A100-SXM-80GB": "0.14.0", "H100-SXM-80GB": "0.24.0", "L40S": "0.24.0"}
_SGLANG_OF_EXTRACT = "0.5.10"  # the A100's second tables, recognised by a kernel name without ``vllm``

_HEADS = ("num_heads", "num_key_value_heads", "head_dim", "batch_size")
_FORMS = {
    "GEMMs": ("gemm_dtype", "m", "n", "k"),
    "generation attention (extract)": (*_HEADS, "kv_len"),
    "generation attention": (*_HEADS, "isl", "step"),
    "context attention": (*_HEADS, "isl"),
    "all-reduce (extract)": ("impl", "op_name", "num_gpus", "message_elements"),
    "NCCL or custom all-reduce": ("op_name", "num_gpus", "message_size"),
    "fused experts": ("num_tokens", "num_experts", "topk", "moe_tp_size"),
}
_MESSAGE_DTYPES = ("nccl_dtype", "allreduce_dtype")  # its sizes count elements; those of the extracts are halves
_BYTES = {"half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4, "int8": 1, "fp8": 1}
_BITS = {"bfloat16": 16, "float16": 16, "fp8": 8, "fp8_block": 8, "int8_wo": 8, "int4_wo": 4, "nvfp4": 4}


def read(sheet: Sheet, into: Collection) -> None:
    """Add every row of one table for which the cost model has an operator. Fused experts are left out."""
    form = require(sheet, _FORMS)
    if form == "generation attention" and "generation" not in sheet.columns.get("op_name", ("generation",))[0]:
        form = "context attention"  # its own prefill tables have a step column of zeros
    rows = Rows(sheet)
    time = next((name for name in ("latency_ms", "latency") if sheet.has(name)), "latency_ms")
    if not sheet.has(time):
        require(sheet, {form: ("latency_ms",)})
    for index in rows:
        gpu, by = _origin(rows, index)
        if gpu is None:
            continue
        place = (rows, index, time)
        seconds = rows.seconds(index, time, unit_s=1e-3)
        if form == "GEMMs":
            _gemm(rows, index, gpu, by, seconds, place, into)
        elif "attention" in form:
            _attention(rows, index, gpu, by, seconds, place, into, decode="generation" in form)
        elif "all-reduce" in form:
            _all_reduce(rows, index, gpu, by, seconds, place, into)
        else:
            into.note(gpu, by, f"{Path(sheet.file).name}: fused experts have no operator of the cost model; left out")
    rows.finish()


Place = tuple[Rows, int, str]


def _gemm(
    rows: Rows, index: int, gpu: str, by: MeasuredBy, seconds: float | None, place: Place, into: Collection
) -> None:
    dtype = rows.text(index, "gemm_dtype")
    if dtype not in _BITS:
        into.note(gpu, by, f"GEMMs of type {dtype} are left out")
        return
    bits = _BITS[dtype]
    if dtype not in ("bfloat16", "float16", "fp8", "nvfp4"):
        into.note(gpu, by, f"GEMMs of type {dtype} (weights only, or scaled by blocks) are left out")
        return
    sizes = {name: rows.count(index, name) for name in ("m", "n", "k")}
    into.add(gpu, by, MeasuredOp.GEMM, dtype, place, {**sizes, "weight_bits": bits, "seconds": seconds})


def _attention(
    rows: Rows, index: int, gpu: str, by: MeasuredBy, seconds: float | None, place: Place, into: Collection,
    *, decode: bool,
) -> None:  # fmt: skip
    for name, wanted in (("beam_width", ("1",)), ("window_size", ("0", "-1", ""))):
        if rows.sheet.has(name) and rows.text(index, name) not in wanted:
            into.note(gpu, by, f"attention rows with {name} other than {wanted[0]} are left out")
            return
    for name in ("kv_cache_dtype", "attn_dtype"):
        if rows.sheet.has(name) and rows.text(index, name) not in ("bfloat16", "float16"):
            into.note(gpu, by, f"attention rows with {name} other than 16 bits are left out")
            return
    heads = {
        "query_heads": rows.count(index, "num_heads"),
        "kv_heads": rows.count(index, "num_key_value_heads", least=0),
        "head_dim": rows.count(index, "head_dim"),
        "batch": rows.count(index, "batch_size"),
    }
    if heads["kv_heads"] == 0:  # its own files say 0 for as many as query heads
        heads["kv_heads"] = heads["query_heads"]
    kernel = rows.text(index, "kernel_source") if rows.sheet.has("kernel_source") else ""
    if decode and rows.sheet.has("kv_len"):
        sizes = {"context_tokens": rows.count(index, "kv_len")}
    elif decode:
        isl, step = rows.count(index, "isl"), rows.count(index, "step", least=0)
        sizes = {"context_tokens": None if isl is None or step is None else isl + step}
    else:
        sizes = {"tokens": rows.count(index, "isl"), "past_tokens": 0}
    op = MeasuredOp.DECODE_ATTENTION if decode else MeasuredOp.PREFILL_ATTENTION
    into.add(gpu, by, op, kernel, place, {**heads, **sizes, "seconds": seconds})


def _all_reduce(
    rows: Rows, index: int, gpu: str, by: MeasuredBy, seconds: float | None, place: Place, into: Collection
) -> None:
    if "all_reduce" not in rows.text(index, "op_name") or seconds is None:
        return
    dtype = next((rows.text(index, name) for name in _MESSAGE_DTYPES if rows.sheet.has(name)), "half")
    if dtype not in _BYTES:
        into.note(gpu, by, f"messages of {dtype} are left out")
        return
    extract = rows.sheet.has("message_elements")
    elements = rows.count(index, "message_elements" if extract else "message_size")
    impl = rows.text(index, "impl") if extract else _column(rows, index, "kernel_source", "NCCL")
    into.add(
        gpu, by, MeasuredOp.ALL_REDUCE, impl, place,
        {
            "num_gpus": rows.count(index, "num_gpus", least=2),
            "num_bytes": None if elements is None else _BYTES[dtype] * elements,
            "impl": impl,
            "seconds": seconds,
        },
    )  # fmt: skip


def _origin(rows: Rows, index: int) -> tuple[str | None, MeasuredBy]:
    """Return the GPU and the measurer, from the row or, for the extracts, from their README."""
    column = next((name for name in ("device", "gpu") if rows.sheet.has(name)), None)
    if column is None:
        require(rows.sheet, {"any kind": ("device",)})
        raise AssertionError("require raises")
    gpu = gpu_name(rows, index, column)
    kernel = _column(rows, index, "kernel_source", "vllm")
    if rows.sheet.has("framework", "version"):
        engine = rows.text(index, "framework")
        return gpu, MeasuredBy(
            tool=TOOL, engine=engine, engine_version=rows.text(index, "version"), source=TOOL, licence="Apache-2.0"
        )
    by = replace(_EXTRACT, engine_version=_VLLM_OF_EXTRACT.get(gpu or "", ""), source="data/profiles")
    if "vllm" not in kernel:
        by = replace(by, engine="SGLang", engine_version=_SGLANG_OF_EXTRACT)
    return gpu, by


def _column(rows: Rows, index: int, name: str, default: str) -> str:
    return rows.text(index, name) if rows.sheet.has(name) else default
