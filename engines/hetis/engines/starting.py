"""Starts a process of a layout's engine, whichever engine that is."""

from __future__ import annotations

from hetis.engines import sglang, vllm
from hetis.engines.layout import Layout
from hetis.engines.serving import Meeting, Serving
from hetis.engines.versions import Engine
from hetis.solver.plan import Role


def program_of(engine: Engine) -> tuple[str, ...]:
    """Return the command that starts the engine, if the user gives none."""
    return sglang.SERVE if engine is Engine.SGLANG else ("vllm", "serve")


def arguments_of(layout: Layout, serving: Serving, number: int, meeting: Meeting) -> tuple[str, ...]:
    """Return program and options of one process of the engine, counted from 0."""
    command_line = sglang.sglang_arguments if layout.engine is Engine.SGLANG else vllm.vllm_arguments
    return command_line(layout, serving, number, meeting)


def partition_of(layout: Layout) -> dict[str, str]:
    """Return the environment variable that gives each stage of the engine its layers."""
    variable = sglang.PARTITION_VARIABLE if layout.engine is Engine.SGLANG else vllm.PARTITION_VARIABLE
    return {variable: ",".join(map(str, layout.layers))} if len(layout.layers) > 1 else {}


def own_address_of(layout: Layout, host: str) -> dict[str, str]:
    """Return the variable with a process's own address, for stages on several nodes."""
    return {} if layout.engine is Engine.SGLANG else {vllm.HOST_VARIABLE: host}


def kv_address_of(layout: Layout, host: str, port: int) -> dict[str, str]:
    """Return the variables with the address where vLLM's prefill replica is asked for KV. SGLang has an option."""
    if layout.role is not Role.PREFILL or layout.engine is Engine.SGLANG:
        return {}
    return {vllm.KV_HOST_VARIABLE: host, vllm.KV_PORT_VARIABLE: str(port)}
