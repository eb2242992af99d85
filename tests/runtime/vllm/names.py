"""Names of vLLM that the plugin uses and that this vLLM lacks, a line for each. Run by vLLM's own Python."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

PLUGIN = Path(__file__).parents[3] / "runtime" / "hetis" / "runtime" / "vllm"
# What is not imported by name: methods that vLLM calls, and fields
ATTENTION, CONNECTOR = "vllm.v1.attention.backend", "vllm.distributed.kv_transfer.kv_connector.v1.base"
MEMBERS = {
    (ATTENTION, "AttentionBackend"): ("customize_spec", "forward_includes_kv_cache_update", "get_builder_cls"),
    (ATTENTION, "AttentionMetadataBuilder"): ("build", "build_for_cudagraph_capture", "get_cudagraph_support"),
    (ATTENTION, "CommonAttentionMetadata"): (
        "block_table_tensor",
        "max_seq_len",
        "num_actual_tokens",
        "query_start_loc_cpu",
        "seq_lens_cpu_upper_bound",
        "slot_mapping",
    ),
    (CONNECTOR, "KVConnectorBase_V1"): (
        "bind_connector_metadata",
        "bind_kv_cache_manager",
        "build_connector_worker_meta",
        "get_block_ids_with_load_errors",
        "handle_preemptions",
        "on_new_request",
        "set_xfer_handshake_metadata_pp_aware",
        "wait_for_save",
    ),
    ("vllm.forward_context", "ForwardContext"): ("batch_descriptor", "cudagraph_runtime_mode"),
    ("vllm.v1.kv_cache_spec_registry", "KVCacheSpecRegistry"): ("_ensure_registered", "register"),
    ("vllm.distributed.kv_transfer.kv_connector.factory", "KVConnectorFactory"): ("_registry", "register_connector"),
}


def missing() -> Iterator[str]:
    """Yield the names that are not there."""
    for module, name in sorted(_imported()):
        if not hasattr(importlib.import_module(module), name):
            yield f"{module}.{name}"
    for (module, owner), members in MEMBERS.items():
        found = getattr(importlib.import_module(module), owner)
        known = {*dir(found), *getattr(found, "__dataclass_fields__", ())}
        yield from (f"{module}.{owner}.{member}" for member in members if member not in known)


def _imported() -> set[tuple[str, str]]:
    """Return modules of vLLM and the names that the plugin imports from them."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PLUGIN.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        (node.module, alias.name)
        for node in nodes
        if node.module is not None and node.module.partition(".")[0] == "vllm"
        for alias in node.names
    }


if __name__ == "__main__":
    print("\n".join(["names:", *missing()]))
