"""Settings of engines that rows of InferenceX do not repeat, from its published scripts (SemiAnalysisAI/InferenceX,
Apache-2.0, ``benchmarks/``, as of the rows' dates: October 2025 to April 2026).

They depend on engine, model, GPU and load as the scripts say, and never on what was measured. Rows of other sources
have an engine's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an engine was started with.

    Attributes:
        chunk_tokens: max_num_batched_tokens, chunked_prefill_size or max_num_tokens.
        stream_interval: tokens of a request that are sent together; 1 for vLLM, which sends from another process.
        has_fp8_kv: the KV cache has 8 bits, whatever the weights; None: as for the engine elsewhere.
        poll_iterations: decoding iterations between two looks for new requests (SGLang's scheduler_recv_interval).
        wait_iterations, wait_tokens: new prompts wait for so many iterations, or until an iteration has so many tokens
            (TensorRT-LLM's batch_wait_timeout_iters and batch_wait_max_tokens_ratio).
    """

    chunk_tokens: int = 8192
    stream_interval: int = 1
    has_fp8_kv: bool | None = None
    poll_iterations: int = 1
    wait_iterations: int = 0
    wait_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of a script: the load, and what it was started for. ``precision`` is that of the weights, fp8 or fp4."""

    engine: str
    model: str
    gpu: str
    precision: str
    tp: int
    requests: int
    prompt_tokens: int
    output_tokens: int


def settings_of(run: Run) -> Settings:
    """Return the settings of a run by InferenceX."""
    return {"vllm": _vllm, "trtllm": _trtllm, "sglang": _sglang}[run.engine](run)


def _vllm(run: Run) -> Settings:
    if "MiniMax" in run.model and run.gpu.startswith("B200"):
        return Settings(chunk_tokens=2 * run.prompt_tokens, has_fp8_kv=True)
    return Settings()


def _trtllm(run: Run) -> Settings:
    is_short = run.prompt_tokens == run.output_tokens == 1024
    if "Llama" in run.model:
        waits = is_short and run.tp < 8
        return Settings(
            chunk_tokens=16384,
            stream_interval=10,
            wait_iterations=20 if waits else 0,
            wait_tokens=int(0.9 * 16384) if waits else 0,
        )
    if "gpt-oss" in run.model:
        return Settings(chunk_tokens=20000, stream_interval=20)
    chunk_tokens = max(8192, (run.requests + run.prompt_tokens + 64 + 63) // 64 * 64)
    waits = is_short and run.precision == "fp8" and run.requests >= 64
    return Settings(
        chunk_tokens=chunk_tokens,
        stream_interval=10,
        wait_iterations=40 if waits else 0,
        wait_tokens=int(0.8 * chunk_tokens) if waits else 0,
    )


def _sglang(run: Run) -> Settings:
    often = 10 if run.requests < 16 else 30
    if run.precision == "fp4":
        return Settings(chunk_tokens=16384, stream_interval=10, poll_iterations=often)
    if run.tp == 8:
        return Settings(chunk_tokens=32768, stream_interval=30, poll_iterations=often)
    return Settings(chunk_tokens=8192, stream_interval=30, poll_iterations=10)
