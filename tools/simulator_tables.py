"""Tables that simulators publish: vidur's, LLMServingSim's and Splitwise's (microsoft/vidur, casys-kaist/LLMServingSim,
Mutinifni/splitwise-sim; MIT), from which shipped profiles are made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.files import read_text
from hetis.formats.measurements import MeasuredBy, MeasuredOp, Measurements
from hetis.profiler import importers
from hetis.profiler.fit.errors import SERVING
from hetis.profiler.importers.reading import Collection, Sheet, SheetRow, catalogue_name
from hetis.solver.model import Kernel, ModelSpec
from hetis.solver.profile import Op

_VIDUR = MeasuredBy(tool="microsoft/vidur", engine="Sarathi-Serve", source="data/profiles", licence="MIT")
_SERVING_SIM = MeasuredBy(tool="casys-kaist/LLMServingSim", engine="vLLM", source="data/profiles", licence="MIT")
_SPLITWISE = MeasuredBy(
    tool="Mutinifni/splitwise-sim", engine="vLLM", engine_version="2023", source="data/profiles", licence="MIT"
)

_ATTENTION_COLUMNS = (
    "gpu", "n_embd", "n_q_head", "n_kv_head", "tp", "batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill",
    "attn_prefill_ms", "attn_decode_ms",
)  # fmt: skip
_PROJECTIONS = ("attn_pre_proj_ms", "attn_post_proj_ms", "mlp_up_proj_ms", "mlp_down_proj_ms")
_ELEMENTWISE = ("input_layernorm_ms", "post_attention_layernorm_ms", "attn_rope_ms", "mlp_act_ms", "add_ms")
_SIZES = ("n_expanded_embd", "num_tokens")
_VIDUR_FORMS = {
    "layer operators": (
        *("gpu", "model", "use_gated_mlp", *_PROJECTIONS, *_ELEMENTWISE),
        *("n_head", "n_kv_head", "n_embd", "tp", *_SIZES),
    ),
    "attention": _ATTENTION_COLUMNS,
    "collectives": ("topology", "collective", "num_workers", "devices_per_node", "bytes", "median_ms"),
    "host overheads": ("gpu", "batch_size", "sampler_e2e_ms"),
}
# The boards behind the hosts' names: DGX have SXM modules; pairwise NVLink bridges connect PCIe boards.
_TOPOLOGIES = {
    "a100_dgx": "A100-SXM-80GB",
    "h100_dgx": "H100-SXM-80GB",
    "a40": "A40",
    "a40_pairwise_nvlink": "A40",
    "a100_pairwise_nvlink": "A100-PCIe-80GB",
    "h100_pairwise_nvlink": "H100-PCIe-80GB",
}
# Since 2026 its profiler leaves what all rows share to the folders: `meta.yaml` and `tpN/attention.csv`, for example.
_MIXED = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
_SERVING_SIM_FORMS = {
    "layers": ("gpu", "model", "layer", "tokens", "tp", "latency_ns"),
    "attention": _ATTENTION_COLUMNS,
    "dense.csv": ("layer", "tokens", "time_us"),
    "attention.csv": (*_MIXED, "time_us"),
}
_SERVING_SIM_ELEMENTWISE = (
    *("input_layernorm", "post_layernorm", "rope", "act_fn"),
    *("layernorm", "rotary_emb", "qk_norm"),
)
_META = re.compile(r"^(gpu|model|variant|vllm_version):[ \t]*(.*?)[ \t\r]*$", re.MULTILINE)
_COUNTS = {
    "tp": "tensor_parallel",
    "batch": "batch_size",
    "prompt_tokens": "prompt_size",
    "output_tokens": "token_size",
}
_SPLITWISE_FORMS = {"end-to-end times": ("model", "hardware", *_COUNTS.values(), "prompt_time_ms", "token_time_ms")}


def read_vidur(sheet: Sheet, into: Collection) -> None:
    """Add vidur's attention, layer operators, collectives or host overheads, which are in milliseconds."""
    form = sheet.require(_VIDUR_FORMS)
    for row in sheet:
        if form == "collectives":
            _collective(row, into)
        elif form == "layer operators":
            _layer(row, into)
        elif form == "host overheads":
            _step(row, into)
        elif gpu := row.gpu("gpu"):
            _attention(row, gpu, _VIDUR, "flash_attention", into)


def read_llmservingsim(sheet: Sheet, into: Collection) -> None:
    """Add attention or the operators of a layer: in ms and ns, or in µs from the tables of its present profiler.

    Embeddings, LM head, the attention among the layers, and experts are left out.
    """
    form = sheet.require(_SERVING_SIM_FORMS)
    if form == "attention.csv":
        _batches(sheet, _run_of(sheet.file), into)
        return
    if form == "dense.csv":
        _operators(sheet, _run_of(sheet.file), into)
        return
    for row in sheet:
        if gpu := row.gpu("gpu"):
            if form == "attention":
                _attention(row, gpu, _SERVING_SIM, "vllm_attention", into)
            else:
                _catalogued_layer(row, gpu, into)


def read_splitwise(sheet: Sheet, into: Collection) -> None:
    """Add two rows for each row of Splitwise's end-to-end table: prompt and token times of a whole engine."""
    sheet.require(_SPLITWISE_FORMS)
    for row in sheet:
        gpu, name = row.gpu("hardware"), row.text("model")
        try:
            model = catalogue.find_model(name).model.name
        except catalogue.UnknownNameError as error:
            row.refuse("model", str(error))
            continue
        if gpu is None:
            continue
        by = _SPLITWISE.model_copy(update={"host": "power-capped" if row.text("hardware").endswith("-pcap") else ""})
        counts = {name: row.count(column) for name, column in _COUNTS.items()}
        for phase in ("prompt", "token"):
            time = f"{phase}_time_ms"
            seconds = row.seconds(time, unit_s=1e-3)
            into.add(
                gpu, by, MeasuredOp.E2E, "engine", row, time, **counts, model=model, phase=phase, seconds=seconds
            )  # fmt: skip


def _attention(row: SheetRow, gpu: str, by: MeasuredBy, kernel: str, into: Collection) -> None:
    """Add one row as Sarathi-Serve's profiler writes it: prefill of a chunk, or decode, on one rank."""
    heads, batch = _heads(row, "n_q_head"), row.count("batch_size")
    is_prefill = row.flag("is_prefill")
    if heads is None or batch is None or is_prefill is None:
        return
    hidden, q_heads, kv_heads, tp = heads
    if is_prefill:
        time, op = "attn_prefill_ms", MeasuredOp.PREFILL_ATTENTION
        sizes = {"tokens": row.count("prefill_chunk_size"), "past_tokens": row.count("kv_cache_size", least=0)}
    else:
        time, op = "attn_decode_ms", MeasuredOp.DECODE_ATTENTION
        sizes = {"context_tokens": row.count("kv_cache_size")}
    shape = _heads_of_rank(q_heads, kv_heads, hidden // q_heads, tp)
    seconds = row.seconds(time, unit_s=1e-3)
    into.add(gpu, by, op, kernel, row, time, batch=batch, **sizes, **shape, seconds=seconds)


def _heads_of_rank(q_heads: int, kv_heads: int, head_dim: int, tp: int) -> dict[str, int]:
    """Return the columns of one rank's heads; ranks share a KV head if there are more of them."""
    return {"query_heads": q_heads // tp, "kv_heads": max(1, kv_heads // tp), "head_dim": head_dim}


def _heads(row: SheetRow, q_heads_column: str) -> tuple[int, int, int, int] | None:
    """Return (hidden size, query heads, KV heads, TP degree) of a row, or None after noting the problem.

    Every head must have a whole number of dimensions, every rank a whole number of query heads.
    """
    hidden, q_heads, kv_heads, tp = (row.count(name) for name in ("n_embd", q_heads_column, "n_kv_head", "tp"))
    if hidden is None or q_heads is None or kv_heads is None or tp is None:
        return None
    if hidden % q_heads:
        row.refuse(q_heads_column, f"is {q_heads}, must divide the {hidden} of n_embd")
    elif q_heads % tp:
        row.refuse("tp", f"is {tp}, must divide the {q_heads} heads of {q_heads_column}")
    elif q_heads % kv_heads:
        row.refuse("n_kv_head", f"is {kv_heads}, must divide the {q_heads} heads of {q_heads_column}")
    else:
        return hidden, q_heads, kv_heads, tp
    return None


def _layer(row: SheetRow, into: Collection) -> None:
    gpu = row.gpu("gpu")
    heads, inner, tokens = _heads(row, "n_head"), *(row.count(name) for name in _SIZES)
    gated = row.flag("use_gated_mlp")
    if gpu is None or heads is None or inner is None or tokens is None or gated is None:
        return
    hidden, q_heads, kv_heads, tp = heads
    gates, head_dim = 2 if gated else 1, hidden // q_heads
    params = {
        "attn_pre_proj_ms": hidden * (q_heads + 2 * kv_heads) * head_dim // tp,
        "attn_post_proj_ms": hidden * hidden // tp,
        "mlp_up_proj_ms": gates * hidden * inner // tp,
        "mlp_down_proj_ms": hidden * inner // tp,
    }
    for column in (*_PROJECTIONS, *_ELEMENTWISE):
        if column in _ELEMENTWISE and not (row.text(column).strip() and row.number(column)):
            continue  # no such operator in this model, below the table's microsecond, or already refused
        into.add(
            gpu, _VIDUR, MeasuredOp.LAYER, "torch", row, column,
            model=row.text("model"), op=column.removesuffix("_ms"), tp=tp, tokens=tokens, hidden=hidden,
            params=params.get(column, 0), weight_bits=16, seconds=row.seconds(column, unit_s=1e-3),
        )  # fmt: skip


def _collective(row: SheetRow, into: Collection) -> None:
    topology = row.text("topology")
    gpu = _TOPOLOGIES.get(topology)
    if gpu is None:
        row.refuse("topology", f"is {topology!r}, expected one of {', '.join(_TOPOLOGIES)}")
        return
    by = _VIDUR.model_copy(update={"engine": "NCCL", "host": topology})
    workers, per_node = row.count("num_workers", least=2), row.count("devices_per_node")
    sized = {"num_bytes": row.count("bytes"), "seconds": row.seconds("median_ms", unit_s=1e-3)}
    if row.text("collective") == "send_recv":
        path = "peer" if workers == per_node else "network"
        into.add(gpu, by, MeasuredOp.TRANSFER, "send_recv", row, "median_ms", **sized, path=path)
    elif row.text("collective") != "all_reduce":
        into.note(gpu, by, f"{row.text('collective')} rows are left out: the cost model has no such operator")
    elif workers == per_node:
        into.add(gpu, by, MeasuredOp.ALL_REDUCE, "NCCL", row, "median_ms", **sized, num_gpus=workers, impl="NCCL")
    else:
        into.note(gpu, by, "all-reduces across nodes are left out: the cost model has none")


def _step(row: SheetRow, into: Collection) -> None:
    gpu, batch, time = row.gpu("gpu"), row.count("batch_size"), "sampler_e2e_ms"
    if gpu is not None:
        seconds = row.seconds(time, unit_s=1e-3)
        into.add(gpu, _VIDUR, MeasuredOp.STEP, "sampler_e2e", row, time, batch=batch, tokens=batch, seconds=seconds)


@dataclass(frozen=True, slots=True)
class _Run:
    """What a table of LLMServingSim's does not say row by row."""

    gpu: str
    by: MeasuredBy
    model: ModelSpec
    tp: int


def _run_of(file: str) -> _Run:
    """Return what the folders of a table say: ``VARIANT/meta.yaml`` and ``VARIANT/tpN``. Raises DocumentError."""
    folder = Path(file).absolute().parent
    degree = re.fullmatch(r"tp([1-9]\d{0,3})", folder.name)
    if degree is None:
        message = f"is in the folder {folder.name}, expected tp1, tp2, ...: the table does not say its TP degree"
        raise single_problem(file, message)
    meta = folder.parent / "meta.yaml"
    try:
        found = dict(_META.findall(read_text(meta)))
    except DocumentError as error:
        without = Problem(file=file, message="the table itself says neither GPU nor model")
        raise DocumentError([*error.problems, without]) from None
    said = {name: found.get(name, "").strip("'\"") for name in ("gpu", "model", "variant", "vllm_version")}
    gpu, model, tp = catalogue_name(said["gpu"]), catalogue.known_model(said["model"]), int(degree[1])
    wrong = {
        "gpu": "no GPU of the catalogue, or several" if gpu is None else "",
        "model": "not a model of the catalogue" if model is None else _unread(model, tp),
        "variant": "" if said["variant"] in ("bf16", "fp16") else "expected bf16 or fp16: weights and KV of 16 bits",
    }
    problems = [
        Problem(file=str(meta), path=name, message=f"is {said[name]!r}, {why}") for name, why in wrong.items() if why
    ]
    if gpu is None or model is None or problems:
        raise DocumentError(problems)
    by = _SERVING_SIM.model_copy(update={"engine_version": said["vllm_version"], "source": "profiler/perf"})
    return _Run(gpu, by, model, tp)


def _unread(model: ModelSpec, tp: int) -> str:
    """Return why attention of a rank cannot be told from the model, or nothing."""
    if Kernel.LATENT in model.kernels:
        return "whose attention is latent: its tables are not read"
    return f"whose {model.q_heads} heads TP {tp} does not divide" if model.q_heads % tp else ""


def _batches(sheet: Sheet, run: _Run, into: Collection) -> None:
    """Add attention of a chunk of a prompt, of decoding requests, or of both in one kernel; and note how long those
    take, compared with the sum.
    """
    model, tp = run.model, run.tp
    shape, serving = _heads_of_rank(model.q_heads, model.kv_heads, model.head_dim, tp), SERVING[Op.DECODE_ATTENTION]
    kernel, alone, mixed = "vllm_attention", dict[tuple[int, ...], float](), list[tuple[tuple[int, ...], float]]()
    for row in sheet:
        sizes = [row.count(name, least=0) for name in _MIXED]
        seconds = row.seconds("time_us", unit_s=1e-6)
        if None in sizes or seconds is None:
            continue
        chunk, past, batch, context = (int(size or 0) for size in sizes)
        if not chunk and not batch:
            row.refuse("n_decode", "is 0, and so is prefill_chunk: nothing is attended to")
            continue
        counts: dict[str, int | None] = {"batch": batch or 1}
        counts |= {"tokens": chunk, "past_tokens": past} if chunk else {}
        counts |= {"context_tokens": row.count("kv_decode")} if batch else {}
        if chunk and batch:
            op = MeasuredOp.MIXED_ATTENTION
            mixed.append(((chunk, past, batch, context), seconds))
        else:
            op = MeasuredOp.PREFILL_ATTENTION if chunk else MeasuredOp.DECODE_ATTENTION
            alone[chunk, past, batch, context] = seconds
        into.add(run.gpu, run.by, op, kernel, row, "time_us", **counts, **shape, seconds=seconds)
    ratios = [
        seconds / (alone[chunk, past, 0, 0] + alone[0, 0, batch, context])
        for (chunk, past, batch, context), seconds in mixed
        if not serving.outside(batch=batch, context_tokens=context)
        and (chunk, past, 0, 0) in alone
        and (0, 0, batch, context) in alone
    ]
    if ratios:
        low, median, high = np.percentile(ratios, (10, 50, 90))
        note = (
            f"chunks beside decoding requests of {model.name} TP {tp} take {median:.2f} times the sum of the two alone "
            f"in the serving range ({low:.2f} to {high:.2f} in 8 of 10; {len(ratios):,} rows)"
        )
        into.note(run.gpu, run.by, note)


def _operators(sheet: Sheet, run: _Run, into: Collection) -> None:
    for row in sheet:
        op = row.text("layer")
        calls = 2 if op == "layernorm" else 1  # timed once, and called twice in a layer
        _operator(row, run, op, row.seconds("time_us", unit_s=1e-6 * calls), "time_us", into)


def _catalogued_layer(row: SheetRow, gpu: str, into: Collection) -> None:
    """Add an operator of LLMServingSim's, whose sizes the catalogue has."""
    model, op, tp = catalogue.known_model(row.text("model")), row.text("layer"), row.count("tp")
    if model is None:
        row.refuse("model", f"is {row.text('model')!r}, which is not a model of the catalogue")
        return
    seconds = row.seconds("latency_ns", unit_s=1e-9)
    if tp is not None:
        _operator(row, _Run(gpu, _SERVING_SIM, model, tp), op, seconds, "latency_ns", into)


def _operator(row: SheetRow, run: _Run, op: str, seconds: float | None, time: str, into: Collection) -> None:
    """Add an operator of a layer, unless hetis has none like it, or it has other sizes than in a plain layer."""
    model, tokens, params = run.model, row.count("tokens"), _params(run.model, op)
    if params is None or model.plain_layer is None:
        note = "experts, embeddings, LM head and the attention among the layers are left out"
        into.note(run.gpu, run.by, note)
        return
    into.add(
        run.gpu, run.by, MeasuredOp.LAYER, "torch", row, time,
        model=model.name, op=op, tp=run.tp, tokens=tokens, hidden=model.hidden, params=params // run.tp, weight_bits=16,
        seconds=seconds,
    )  # fmt: skip


def _params(model: ModelSpec, op: str) -> int | None:
    if op in _SERVING_SIM_ELEMENTWISE:
        return 0
    if model.plain_layer is None:
        return None
    heads = {
        "q_proj": model.q_heads,
        "k_proj": model.kv_heads,
        "v_proj": model.kv_heads,
        "qkv_proj": model.q_heads + 2 * model.kv_heads,
        "o_proj": model.q_heads,
    }
    if op in heads:
        return heads[op] * model.head_dim * model.hidden
    matrices = {"gate_proj": 1, "up_proj": 1, "down_proj": 1, "gate_up_proj": 2}
    return matrices[op] * model.plain_layer[1].width * model.hidden if op in matrices else None


READERS = {
    **importers.READERS,
    "vidur": read_vidur,
    "splitwise": read_splitwise,
    "llmservingsim": read_llmservingsim,
}


def import_tables(form: str, files: Sequence[str | Path]) -> list[Measurements]:
    """Return the measurements in tables of simulators, too, as `hetis.profiler.importers.import_tables` does."""
    return importers.import_tables(form, files, readers=READERS)
