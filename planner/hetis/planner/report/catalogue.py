"""The catalogues as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import RenderableType

from hetis.formats.catalogue import GpuEntry, ModelEntry, WorkloadEntry
from hetis.planner.report.blocks import grid_of
from hetis.planner.report.figures import digits, tokens
from hetis.planner.report.tables import drawn, table_of


def gpu_table(entries: Sequence[GpuEntry], profiles: Mapping[str, str | None], *, wide: bool = False) -> RenderableType:
    """Return GPU types with the peaks that plans depend on, and the origins of their default profiles.

    ``wide`` adds the other peaks and the board power.
    """

    def shown(value: float | None, form: Callable[[float], str]) -> str:
        return "" if value is None else form(value)

    def per_second(rate: float) -> str:
        return f"{rate / 1e9:,.0f} GB/s"

    every = grid_of(
        entries,
        ("'name", lambda one: one.gpu.name),
        ("'architecture", lambda one: one.gpu.architecture),
        ("memory", lambda one: f"{one.gpu.memory_bytes / 2**30:.0f} GiB"),
        ("GB/s", lambda one: f"{one.gpu.mem_bytes_per_s / 1e9:,.0f}"),
        ("TFLOPS", lambda one: digits(one.gpu.fp16_flops / 1e12)),
        ("NVLink", lambda one: shown(one.gpu.nvlink_bytes_per_s, per_second)),
        ("USD/h", lambda one: shown(one.gpu.usd_per_hour, "{:.2f}".format)),
        ("FP8 TFLOPS", lambda one: shown(one.gpu.fp8_flops, lambda flops: digits(flops / 1e12))) if wide else None,
        ("PCIe", lambda one: shown(one.gpu.pcie_bytes_per_s, per_second)) if wide else None,
        ("TDP", lambda one: shown(one.tdp_w, "{:.0f} W".format)) if wide else None,
        ("'profile", lambda one: profiles[one.gpu.name] or "none"),
        least=("NVLink", "PCIe", "TDP", "architecture"),
    )
    return drawn(every)


def model_table(entries: Sequence[ModelEntry]) -> RenderableType:
    made = grid_of(
        entries,
        ("'name", lambda one: one.model.name),
        ("params", lambda one: f"{digits(one.params_b)}B"),
        ("active", lambda one: f"{digits(one.active_params_b)}B" if one.model.experts is not None else ""),
        ("layers", lambda one: str(one.model.num_layers)),
        ("q/kv", lambda one: f"{one.model.q_heads}/{one.model.kv_heads}"),
        ("'att.", lambda one: one.model.attention.name + (" MoE" if one.model.experts is not None else "")),
        ("context", lambda one: tokens(one.model.max_position)),
        least=("q/kv", "layers", "active"),
    )
    return drawn(made)


def workload_table(entries: Sequence[WorkloadEntry]) -> RenderableType:
    return table_of(
        entries,
        ("'name", lambda one: one.workload.name),
        ("requests", lambda one: f"{one.num_requests:,}"),
        ("rate", lambda one: "" if one.workload.rate_rps is None else f"{digits(one.workload.rate_rps)}/s"),
        ("mean prompt", lambda one: f"{one.workload.moments().mean_prompt:,.0f}"),
        ("p95", lambda one: f"{one.workload.moments().p95_prompt:,.0f}"),
        ("mean output", lambda one: f"{one.workload.moments().mean_output:,.0f}"),
    )
