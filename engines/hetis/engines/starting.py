"""How a process of a layout's engine is started, whichever engine it is."""

from __future__ import annotations

from hetis.engines import sglang, vllm
from hetis.engines.layout import Layout
from hetis.engines.serving import Meeting, Serving
from hetis.engines.versions import Engine
from hetis.solver.plan import Role


def program_of(engine: Engine) -> tuple[str, ...]:
    """The words that start it, where the user gives none."""
    return sglang.SERVE if engine is Engine.SGLANG else ("vllm", "serve")


def arguments_of(layout: Layout, serving: Serving, number: int, meeting: Meeting) -> tuple[str, ...]:
    """Program and options of one process of the engine, counted from 0."""
    command_line = sglang.sglang_arguments if layout.engine is Engine.SGLANG else vllm.vllm_arguments
    return command_line(layout, serving, number, meeting)


def partition_of(layout: Layout) -> dict[str, str]:
    """The variable by which the engine gives each stage its layers."""
    variable = sglang.PARTITION_VARIABLE if layout.engine is Engine.SGLANG else vllm.PARTITION_VARIABLE
    return {variable: ",".join(map(str, layout.layers))} if len(layout.layers) > 1 else {}


def own_address_of(layout: Layout, host: str) -> dict[str, str]:
    """What a process is told of its own address, where stages are on several nodes."""
    return {} if layout.engine is Engine.SGLANG else {vllm.HOST_VARIABLE: host}


def kv_address_of(layout: Layout, host: str, port: int) -> dict[str, str]:
    """Where vLLM's prefill replica is asked for KV; SGLang's has an option for it."""
    if layout.role is not Role.PREFILL or layout.engine is Engine.SGLANG:
        return {}
    return {vllm.KV_HOST_VARIABLE: host, vllm.KV_PORT_VARIABLE: str(port)}
