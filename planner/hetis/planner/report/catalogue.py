"""The catalogues as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from hetis.formats.catalogue import GpuEntry, ModelEntry, WorkloadEntry
from hetis.planner.report.figures import digits, tokens


def gpu_table(entries: Sequence[GpuEntry], profiles: Mapping[str, str | None]) -> Table:
    """Return GPU types with the peaks that plans depend on, and the default origin of their profiles."""
    table = _table(
        ("name", "left"),
        ("architecture", "left"),
        *_right("memory", "GB/s", "TFLOPS", "NVLink", "USD/h"),
        ("profile", "left"),
    )
    for entry in entries:
        gpu = entry.gpu
        table.add_row(
            gpu.name,
            gpu.architecture,
            f"{gpu.memory_bytes / 2**30:.0f} GiB",
            f"{gpu.mem_bytes_per_s / 1e9:,.0f}",
            digits(gpu.fp16_flops / 1e12),
            "" if gpu.nvlink_bytes_per_s is None else f"{gpu.nvlink_bytes_per_s / 1e9:,.0f} GB/s",
            "" if gpu.usd_per_hour is None else f"{gpu.usd_per_hour:.2f}",
            profiles[gpu.name] or "none",
        )
    return table


def model_table(entries: Sequence[ModelEntry]) -> Table:
    """Return models with the shape of their layers."""
    table = _table(
        ("name", "left"), *_right("params", "active", "layers", "q/kv"), ("att.", "left"), *_right("context")
    )
    for entry in entries:
        model = entry.model
        table.add_row(
            model.name,
            f"{digits(entry.params_b)}B",
            f"{digits(entry.active_params_b)}B" if model.moe is not None else "",
            str(model.num_layers),
            f"{model.q_heads}/{model.kv_heads}",
            model.attention.value + (" MoE" if model.moe is not None else ""),
            tokens(model.max_position),
        )
    return table


def workload_table(entries: Sequence[WorkloadEntry]) -> Table:
    """Return traces with the lengths of their requests."""
    table = _table(("name", "left"), *_right("requests", "rate", "mean prompt", "p95", "mean output"))
    for entry in entries:
        moments, rate = entry.workload.moments(), entry.workload.rate_rps
        table.add_row(
            entry.workload.name,
            f"{entry.num_requests:,}",
            "" if rate is None else f"{digits(rate)}/s",
            f"{moments.mean_prompt:,.0f}",
            f"{moments.p95_prompt:,.0f}",
            f"{moments.mean_output:,.0f}",
        )
    return table


def strategy_table(entries: Sequence[tuple[str, str]]) -> Table:
    """Return strategies with what each of them searches."""
    table = _table(("name", "left"), ("searches", "left"))
    for name, summary in entries:
        table.add_row(name, summary)
    return table


def _right(*names: str) -> list[tuple[str, str]]:
    return [(name, "right") for name in names]


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for name, side in columns:
        table.add_column(name, justify="left" if side == "left" else "right", overflow="fold")
    return table
