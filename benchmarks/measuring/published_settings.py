"""Settings of engines that rows of InferenceX do not repeat, from its published scripts (SemiAnalysisAI/InferenceX,
Apache-2.0, ``benchmarks/``, as of the rows' dates: October 2025 to April 2026).

They depend on engine, model, GPU and load as the scripts say, and never on what was measured. Rows of other sources
have an engine's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

# DeepSeek-R1 on B200 under TensorRT-LLM: this tag ran the scripts with MTP, 1.2.0rc6.post2 those without (InferenceX
# pull requests 1488 and 1489). Earlier tags ran both, and their rows do not say which.
DRAFTING_IMAGE = "1.2.0rc6.post3"
DRAFTS = 3
# Of DeepSeek-R1's first draft, as vLLM's pull request 12755 measured it; taken for each draft after an accepted one.
ACCEPTANCE = 0.82


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
        draft_tokens: tokens that the model's own prediction layer drafts in an iteration
            (num_nextn_predict_layers of TensorRT-LLM's MTP).
        static_share: share of a GPU's memory for weights and KV (SGLang's mem_fraction_static).
        free_share: share for KV of the memory that weights and activations leave (TensorRT-LLM's
            free_gpu_memory_fraction).
    """

    chunk_tokens: int = 8192
    stream_interval: int = 1
    has_fp8_kv: bool | None = None
    poll_iterations: int = 1
    wait_iterations: int = 0
    wait_tokens: int = 0
    draft_tokens: int = 0
    static_share: float | None = None
    free_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of a script: the load, and what it was started for.

    ``precision`` is that of the weights, fp8 or fp4; ``image`` the container's tag, empty if it is not recorded.
    """

    engine: str
    image: str
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
    if run.image == DRAFTING_IMAGE:
        # Without a lower limit: prompts of 8,192 tokens are computed one by one.
        most = (DRAFTS + 1) * run.requests + run.prompt_tokens
        return Settings(chunk_tokens=_blocks(most), stream_interval=10, draft_tokens=DRAFTS, free_share=0.8)
    chunk_tokens = max(8192, _blocks(run.requests + run.prompt_tokens))
    waits = is_short and run.precision == "fp8" and run.requests >= 64
    return Settings(
        chunk_tokens=chunk_tokens,
        stream_interval=10,
        wait_iterations=40 if waits else 0,
        wait_tokens=int(0.8 * chunk_tokens) if waits else 0,
        free_share=0.75 if run.precision == "fp8" and run.tp == 4 else 0.8,
    )


def _blocks(tokens: int) -> int:
    """Return the scripts' max_num_tokens: whole blocks of 64, and one more."""
    return (tokens + 64 + 63) // 64 * 64


def _sglang(run: Run) -> Settings:
    often = 10 if run.requests < 16 else 30
    if run.precision == "fp4":
        return Settings(chunk_tokens=16384, stream_interval=10, poll_iterations=often, static_share=0.85)
    if run.tp == 8:
        return Settings(chunk_tokens=32768, stream_interval=30, poll_iterations=often, static_share=0.82)
    return Settings(chunk_tokens=8192, stream_interval=30, poll_iterations=10, static_share=0.95)
