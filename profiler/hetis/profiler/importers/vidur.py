"""vidur's tables (microsoft/vidur, MIT): attention, layer operators, collectives, host overheads; in milliseconds."""

from __future__ import annotations

from hetis.formats.measurements import MeasuredBy, MeasuredOp
from hetis.profiler.importers.attention import ATTENTION_COLUMNS, add_attention, heads_of
from hetis.profiler.importers.collecting import Collection
from hetis.profiler.importers.gpu_names import gpu_name
from hetis.profiler.importers.reading import Rows, Sheet, require

_BY = MeasuredBy(tool="microsoft/vidur", engine="Sarathi-Serve", source="data/profiles", licence="MIT")
_PROJECTIONS = ("attn_pre_proj_ms", "attn_post_proj_ms", "mlp_up_proj_ms", "mlp_down_proj_ms")
_ELEMENTWISE = ("input_layernorm_ms", "post_attention_layernorm_ms", "attn_rope_ms", "mlp_act_ms", "add_ms")
_SIZES = ("n_expanded_embd", "num_tokens")
_SHAPE = ("n_head", "n_kv_head", "n_embd", "tp", *_SIZES)
_FORMS = {
    "layer operators": ("gpu", "model", "use_gated_mlp", *_PROJECTIONS, *_ELEMENTWISE, *_SHAPE),
    "attention": ATTENTION_COLUMNS,
    "collectives": ("topology", "collective", "num_workers", "devices_per_node", "bytes", "median_ms"),
    "host overheads": ("gpu", "batch_size", "sampler_e2e_ms"),
}  # fmt: skip
# The boards behind the hosts' names: DGX have SXM modules; pairwise NVLink bridges connect PCIe boards.
_TOPOLOGIES = {
    "a100_dgx": "A100-SXM-80GB",
    "h100_dgx": "H100-SXM-80GB",
    "a40": "A40",
    "a40_pairwise_nvlink": "A40",
    "a100_pairwise_nvlink": "A100-PCIe-80GB",
    "h100_pairwise_nvlink": "H100-PCIe-80GB",
}


def read(sheet: Sheet, into: Collection) -> None:
    """Add every row of one table."""
    rows = Rows(sheet)
    add = {"layer operators": _layer, "attention": _attention, "collectives": _collective, "host overheads": _step}
    function = add[require(sheet, _FORMS)]
    for index in rows:
        function(rows, index, into)
    rows.finish()


def _layer(rows: Rows, index: int, into: Collection) -> None:
    gpu = gpu_name(rows, index, "gpu")
    heads, inner, tokens = heads_of(rows, index, "n_head"), *(rows.count(index, n) for n in _SIZES)
    gated = rows.flag(index, "use_gated_mlp")
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
        if column in _ELEMENTWISE and not (rows.text(index, column).strip() and rows.number(index, column)):
            continue  # no such operator in this model, below the table's microsecond, or already refused
        into.add(
            gpu, _BY, MeasuredOp.LAYER, "torch", (rows, index, column),
            {
                "model": rows.text(index, "model"),
                "op": column.removesuffix("_ms"),
                "tp": tp,
                "tokens": tokens,
                "hidden": hidden,
                "params": params.get(column, 0),
                "weight_bits": 16,
                "seconds": rows.seconds(index, column, unit_s=1e-3),
            },
        )  # fmt: skip


def _attention(rows: Rows, index: int, into: Collection) -> None:
    gpu = gpu_name(rows, index, "gpu")
    if gpu is not None:
        add_attention(rows, index, gpu, _BY, "flash_attention", into)


def _collective(rows: Rows, index: int, into: Collection) -> None:
    topology = rows.text(index, "topology")
    gpu = _TOPOLOGIES.get(topology)
    if gpu is None:
        rows.refuse(index, "topology", f"is {topology!r}, expected one of {', '.join(_TOPOLOGIES)}")
        return
    by = MeasuredBy(tool=_BY.tool, engine="NCCL", source=_BY.source, licence=_BY.licence, host=topology)
    workers, per_node = rows.count(index, "num_workers", least=2), rows.count(index, "devices_per_node")
    values = {
        "num_bytes": rows.count(index, "bytes"),
        "seconds": rows.seconds(index, "median_ms", unit_s=1e-3),
    }
    place = (rows, index, "median_ms")
    if rows.text(index, "collective") == "send_recv":
        path = "peer" if workers == per_node else "network"
        into.add(gpu, by, MeasuredOp.TRANSFER, "send_recv", place, {**values, "path": path})
    elif workers == per_node:
        into.add(gpu, by, MeasuredOp.ALL_REDUCE, "NCCL", place, {**values, "num_gpus": workers, "impl": "NCCL"})
    else:
        into.note(gpu, by, "all-reduces across nodes are left out: the cost model has none")


def _step(rows: Rows, index: int, into: Collection) -> None:
    gpu, batch = gpu_name(rows, index, "gpu"), rows.count(index, "batch_size")
    if gpu is None:
        return
    by = MeasuredBy(tool=_BY.tool, engine=_BY.engine, source=_BY.source, licence=_BY.licence)
    seconds = rows.seconds(index, "sampler_e2e_ms", unit_s=1e-3)
    into.add(gpu, by, MeasuredOp.STEP, "sampler_e2e", (rows, index, "sampler_e2e_ms"),
             {"batch": batch, "tokens": batch, "seconds": seconds})  # fmt: skip
