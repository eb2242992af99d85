"""The command line of an SGLang process."""

from __future__ import annotations

from hetis.engines.layout import Layout
from hetis.engines.serving import Meeting, Serving, joined
from hetis.solver.plan import Role

PARTITION_VARIABLE = "SGLANG_PP_LAYER_PARTITION"
SERVE = ("sglang", "serve")


def sglang_arguments(layout: Layout, serving: Serving, number: int, meeting: Meeting) -> tuple[str, ...]:
    """Return program and options of one process of SGLang."""
    # With attention data parallelism SGLang divides ranks, requests and chunks by the number of copies.
    stages, copies = len(layout.layers), layout.data_parallel
    told = {"--model-path": serving.model}
    if serving.served_name:
        told["--served-model-name"] = serving.served_name
    if layout.tensor_parallel * copies > 1:
        told["--tp-size"] = str(layout.tensor_parallel * copies)
    if copies > 1:
        told |= {"--dp-size": str(copies), "--ep-size": str(layout.tensor_parallel * copies)}
        told["--enable-dp-attention"] = ""
    if stages > 1:
        told["--pp-size"] = str(stages)
    if len(layout.servers) > 1:
        told |= {"--nnodes": str(len(layout.servers)), "--node-rank": str(number)}
    if layout.meets:  # copies, too, take ports that follow, beside the HTTP port if not told
        told["--dist-init-addr"] = joined(meeting.host, meeting.port)
    told["--max-running-requests"] = str(layout.seats * copies)
    if stages > 1 and layout.micro_batch:
        told["--pp-max-micro-batch-size"] = str(layout.micro_batch)
    if layout.chunk_tokens:
        told["--chunked-prefill-size"] = str(layout.chunk_tokens * copies)
    if (dtype := serving.dtype_of(layout.dtype)) != "auto":
        told["--dtype"] = dtype
    if layout.kv_is_fp8:
        told["--kv-cache-dtype"] = "fp8_e4m3"
    if serving.limits_kv:
        told["--max-total-tokens"] = str(layout.kv_tokens)
        if layout.context_tokens is not None:
            told["--context-length"] = str(layout.context_tokens)
    if layout.draft_tokens:
        told |= {"--speculative-algorithm": "EAGLE", "--speculative-eagle-topk": "1"}
        told["--speculative-num-steps"] = str(layout.draft_tokens)
        told["--speculative-num-draft-tokens"] = str(layout.draft_tokens + 1)
    if layout.role is not Role.UNIFIED:
        told |= {"--disaggregation-mode": layout.role.value, "--disaggregation-transfer-backend": "nixl"}
    if layout.role is Role.PREFILL:
        told["--disaggregation-bootstrap-port"] = str(meeting.kv_port)
    words = [word for name, value in told.items() if not serving.gives(name) for word in (name, value) if word]
    return (*serving.program, *words, "--enable-metrics", *serving.options)
