"""The command line of a vLLM process: it states what the plan decides, and leaves the user's options alone."""

from __future__ import annotations

import json
from collections.abc import Mapping

from hetis.engines.layout import Layout
from hetis.engines.serving import Meeting, Serving
from hetis.solver.plan import Role

CONNECTOR = {"kv_connector": "HetisConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
CONFIG_VARIABLE, PARTITION_VARIABLE, HOST_VARIABLE = "HETIS_VLLM_CONFIG", "VLLM_PP_LAYER_PARTITION", "VLLM_HOST_IP"
KV_HOST_VARIABLE, KV_PORT_VARIABLE = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"
_NIXL_ROLES: Mapping[Role, str] = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}


def connector_of(layout: Layout) -> dict[str, str] | None:
    """Return the connector that a replica needs, if any: ours for attention workers, NIXL between prefill
    and decode.
    """
    if layout.workers:
        return CONNECTOR
    if layout.role in _NIXL_ROLES:
        return {"kv_connector": "NixlConnector", "kv_role": _NIXL_ROLES[layout.role]}
    return None


def room_options(layout: Layout, serving: Serving) -> dict[str, str]:
    """Return options that hold vLLM to the plan's capacity, except for those that the user gives; a switch has an empty
    value.
    """
    given = {
        "--max-num-seqs": str(layout.seats),
        "--max-num-batched-tokens": str(layout.chunk_tokens + layout.seats * (1 + layout.draft_tokens)),
    }
    room = {name: value for name, value in given.items() if not serving.gives(name)}
    if (dtype := serving.dtype_of(layout.dtype)) != "auto":
        room["--dtype"] = dtype
    if layout.kv_is_fp8:
        room["--kv-cache-dtype"] = "fp8"
    if serving.limits_kv:
        room["--kv-cache-memory-bytes"] = str(layout.rank_kv_bytes)
        # vLLM does not start if a request of the model's full context would not fit.
        if layout.context_tokens is not None and not serving.gives("--max-model-len"):
            room["--max-model-len"] = str(layout.context_tokens)
    if layout.draft_tokens and not serving.gives("--speculative-config"):
        room["--speculative-config"] = json.dumps({"method": "mtp", "num_speculative_tokens": layout.draft_tokens})
    if connector := connector_of(layout):
        room["--kv-transfer-config"] = json.dumps(connector)
    if layout.workers and serving.device == "cuda":  # on a CPU the plugin replaces the only backend
        room["--attention-backend"] = "CUSTOM"
    if layout.workers and layout.has_windows_in_some:  # the plugin moves head groups of all layers together
        room["--disable-hybrid-kv-cache-manager"] = ""
    return room


def shape_options(layout: Layout, *, executor: str = "mp") -> dict[str, str]:
    """Return options for the number of ranks and for what starts them."""
    stages, shape = len(layout.layers), dict[str, str]()
    if layout.tensor_parallel > 1:
        shape["--tensor-parallel-size"] = str(layout.tensor_parallel)
    if stages > 1:
        shape["--pipeline-parallel-size"] = str(stages)
    if layout.data_parallel > 1:
        shape |= {"--data-parallel-size": str(layout.data_parallel), "--enable-expert-parallel": ""}
    if stages * layout.tensor_parallel > 1:
        shape["--distributed-executor-backend"] = executor
    return shape


def vllm_arguments(layout: Layout, serving: Serving, number: int, meeting: Meeting) -> tuple[str, ...]:
    """Return program and options of one process of vLLM."""
    arguments = [*serving.program, *(() if serving.program[-1] == "serve" else ("--model",)), serving.model]
    if serving.served_name:
        arguments += ["--served-model-name", serving.served_name]
    arguments += words_of(shape_options(layout))
    if len(layout.servers) > 1:
        arguments += ["--nnodes", str(len(layout.servers)), "--node-rank", str(number)]
        arguments += ["--master-addr", meeting.host, "--master-port", str(meeting.port)]
    if number:
        arguments += ["--headless"]
    return (*arguments, *words_of(room_options(layout, serving)), *serving.options)


def words_of(options: Mapping[str, str]) -> list[str]:
    """Return names and values as the words of a command line."""
    return [word for option in options.items() for word in option if word]
