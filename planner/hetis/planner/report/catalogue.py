"""The catalogues as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from hetis.formats.catalogue import GpuEntry, ModelEntry, WorkloadEntry
from hetis.planner.report.figures import digits, tokens
from hetis.planner.report.tables import Narrowing, narrowing, table


def gpu_table(entries: Sequence[GpuEntry], profiles: Mapping[str, str | None], *, wide: bool = False) -> Narrowing:
    """Return GPU types with the peaks that plans depend on, and the origins of their default profiles.

    ``wide`` adds the other peaks and the board power.
    """

    def per_second(rate: float | None) -> str:
        return "" if rate is None else f"{rate / 1e9:,.0f} GB/s"

    more = ("FP8 TFLOPS", "PCIe", "TDP") if wide else ()
    rows = (
        (
            gpu.name,
            gpu.architecture,
            f"{gpu.memory_bytes / 2**30:.0f} GiB",
            f"{gpu.mem_bytes_per_s / 1e9:,.0f}",
            digits(gpu.fp16_flops / 1e12),
            per_second(gpu.nvlink_bytes_per_s),
            "" if gpu.usd_per_hour is None else f"{gpu.usd_per_hour:.2f}",
            *(
                "" if gpu.fp8_flops is None else digits(gpu.fp8_flops / 1e12),
                per_second(gpu.pcie_bytes_per_s),
                "" if entry.tdp_w is None else f"{entry.tdp_w:.0f} W",
            )[: len(more)],
            profiles[gpu.name] or "none",
        )
        for entry in entries
        for gpu in (entry.gpu,)
    )
    columns = ("'name", "'architecture", "memory", "GB/s", "TFLOPS", "NVLink", "USD/h", *more, "'profile")
    return narrowing(*columns, rows=list(rows), least=("NVLink", "PCIe", "TDP", "architecture"))


def model_table(entries: Sequence[ModelEntry]) -> Narrowing:
    rows = (
        (
            entry.model.name,
            f"{digits(entry.params_b)}B",
            f"{digits(entry.active_params_b)}B" if entry.model.moe is not None else "",
            str(entry.model.num_layers),
            f"{entry.model.q_heads}/{entry.model.kv_heads}",
            entry.model.attention.value + (" MoE" if entry.model.moe is not None else ""),
            tokens(entry.model.max_position),
        )
        for entry in entries
    )
    columns = ("'name", "params", "active", "layers", "q/kv", "'att.", "context")
    return narrowing(*columns, rows=list(rows), least=("q/kv", "layers", "active"))


def workload_table(entries: Sequence[WorkloadEntry]) -> Table:
    rows = (
        (
            entry.workload.name,
            f"{entry.num_requests:,}",
            "" if entry.workload.rate_rps is None else f"{digits(entry.workload.rate_rps)}/s",
            f"{moments.mean_prompt:,.0f}",
            f"{moments.p95_prompt:,.0f}",
            f"{moments.mean_output:,.0f}",
        )
        for entry, moments in ((entry, entry.workload.moments()) for entry in entries)
    )
    return table("'name", "requests", "rate", "mean prompt", "p95", "mean output", rows=rows)


def strategy_table(entries: Sequence[tuple[str, str]]) -> Table:
    return table("'name", "'searches", rows=entries)
