"""Settings of engines that rows of InferenceX do not repeat, from its published scripts and configurations
(SemiAnalysisAI/InferenceX, Apache-2.0, ``benchmarks/`` and ``.github/configs``, as of the rows' dates: October 2025 to
April 2026).

They depend on engine, model, GPU, image, date and load as the scripts specify, and never on what was measured. Rows
of other sources have an engine's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from hetis.profiler.engines import ENGINES
from hetis.solver.model import Kernel, ModelSpec

# Accepted drafts. A curve has the mean tokens of an iteration with 0, 1, 2, ... drafts per request.
# Qwen3.5-397B-A17B: InferenceX, golden_al_distribution/qwen3.5_mtp.yaml (SPEED-Bench, thinking).
# DeepSeek-R1: its first draft as vLLM's pull request 12755 measured it (82%). No curve is published for later drafts;
# each is accepted after the one before as often as DeepSeek-V4-Pro's, whose first is accepted in 79% of cases
# (golden_al_distribution/dsv4_mtp.yaml, thinking: 1.79, 2.27, 2.49).
_FIRST = 0.82
ACCEPTANCE = {
    "DeepSeek-R1": (1.0, 1.0 + _FIRST, 1.0 + _FIRST * (1 + 0.48 / 0.79), 1.0 + _FIRST * (1 + 0.70 / 0.79)),
    "Qwen3.5-397B-A17B": (1.0, 1.93, 2.73, 3.39),
}
# TensorRT-LLM's scripts with MTP for DeepSeek-R1 were merged, and first run, on this day (pull request 392). They ran
# in the image of the scripts without it until 1.2.0rc6.post3.
_FIRST_MTP_DATE, _SHARED_IMAGE, _MTP_IMAGE = "2026-01-14", "1.1.0rc2.post2", "1.2.0rc6.post3"
# From pull request 258 on, DeepSeek-R1's scripts without drafts allow 8,192 tokens or more in an iteration.
_LEAST_TOKENS_DATE = "2026-01-21"
# By default vLLM captures CUDA graphs of up to this many tokens (max_cudagraph_capture_size). On B200 the default was
# 1,024 from July 2026 on (pull request 49390), after these runs.
_GRAPH_TOKENS = 512
_BALANCE_ITERATIONS = 60  # attention_dp_config.timeout_iters of DeepSeek-R1's scripts; batching_wait_iters is 0


class Graphs(Enum):
    """Iterations that run in CUDA graphs; in the others, Python launches every kernel."""

    NONE = "none"
    DECODE = "those without prompts"
    ALL = "all"  # TensorRT-LLM's enable_piecewise_cuda_graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings with which an engine was started.

    Attributes:
        chunk_tokens: max_num_batched_tokens, chunked_prefill_size or max_num_tokens.
        keeps_whole: whether prompts are never split among iterations (TensorRT-LLM without enable_chunked_prefill).
        stream_interval: tokens of a request that are sent together; 1 for vLLM, which sends from another process, and
            for SGLang with drafts, whose host works between iterations and not beside them.
        has_fp8_kv: whether the KV cache has 8 bits, whatever the weights; None: as in the engine's other scripts.
        seats: the most requests that run at once, on a copy (max_num_seqs, max_running_requests, max_batch_size);
            None: no limit below the requests in flight.
        poll_iterations: decoding iterations between two checks for new requests (SGLang's scheduler_recv_interval).
        wait_iterations, wait_tokens: new prompts wait for this many iterations, or until one has this many tokens
            (TensorRT-LLM's batch_wait_timeout_iters and batch_wait_max_tokens_ratio).
        balance_iterations, gather_iterations: prompts wait until all copies have one and ``gather_iterations`` more, or
            for ``balance_iterations`` in all (timeout_iters and batching_wait_iters of its attention_dp_config); 0: no
            wait.
        schedules_ahead: whether an iteration is scheduled while the one before it runs (vLLM's async_scheduling, the
            overlap schedulers of the others), so that a request that arrives meanwhile is too late for it.
        default_experts: whether experts run in the kernels that the engine's recipes choose.
        graphs: which iterations run in CUDA graphs.
        graph_tokens: so do those with prompts, up to this many tokens (vLLM's max_cudagraph_capture_size).
        draft_tokens: tokens that the model's own prediction layer drafts in an iteration
            (num_nextn_predict_layers of TensorRT-LLM's MTP, speculative_num_steps of SGLang's).
        static_share: share of a GPU's memory for weights and KV (SGLang's mem_fraction_static).
        free_share: share for KV of the memory that weights and activations leave (TensorRT-LLM's
            free_gpu_memory_fraction).
    """

    chunk_tokens: int = 8192
    keeps_whole: bool = False
    stream_interval: int = 1
    has_fp8_kv: bool | None = None
    seats: int | None = None
    poll_iterations: int = 1
    wait_iterations: int = 0
    wait_tokens: int = 0
    balance_iterations: int = 0
    gather_iterations: int = 0
    schedules_ahead: bool = True
    default_experts: bool = True
    graphs: Graphs = Graphs.DECODE
    graph_tokens: int = 0
    draft_tokens: int = 0
    static_share: float | None = None
    free_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of a script: the load, and the configuration for which it was started.

    ``precision`` is that of the weights (bf16, fp8 or fp4), ``tp`` the GPUs, ``experts`` the ranks that share out whole
    experts, ``copies`` the ranks with attention of their own and ``requests`` those in flight on one of them. ``image``
    is the container's tag and ``date`` the day, both empty where they are not recorded.
    """

    engine: str
    image: str
    date: str
    model: str
    gpu: str
    precision: str
    tp: int
    experts: int
    copies: int
    requests: int
    prompt_tokens: int
    output_tokens: int


def settings_elsewhere(engine: str, container: str) -> Settings:
    """Return the settings of a run in a container by a source other than InferenceX.

    All runs of vLLM are in 0.12.0, which schedules ahead only on request (from 0.14.0 on by default).

    How the runs in Dynamo 0.9.0 were started is not published. Their TPOT is the same under 5 and under 56 requests,
    and on 4 and on 8 GPUs: that of an engine without CUDA graphs.
    """
    if engine == "vllm":
        return Settings(schedules_ahead=False, graph_tokens=_GRAPH_TOKENS)
    return Settings(graphs=Graphs.NONE if "tensorrtllm-runtime:0.9.0" in container else Graphs.DECODE)


def with_ranks(run: Run) -> Run:
    """Return the run with the ranks of experts and of attention that its configuration has.

    Two dumps state attention data parallelism for every row of vLLM with whole experts, see `_vllm_ranks`. Rows of
    DeepSeek-R1 in FP4 of 2025 state neither. SGLang distributed whole experts; TensorRT-LLM did so above one number of
    requests in flight, and ran attention data-parallel above another.
    """
    if run.engine == "vllm" and "MiniMax" in run.model:
        return _vllm_ranks(run)
    if run.model != "DeepSeek-R1" or run.precision != "fp4" or not "2025" <= run.date < "2026" or run.experts > 1:
        return run
    if run.engine == "sglang":
        return replace(run, experts=run.tp)
    shape, is_small = (run.prompt_tokens, run.output_tokens), run.tp == 4
    whole_above = {(1024, 1024): 32 if is_small else 8, (1024, 8192): 32 if is_small else 16}
    most = whole_above.get(shape, 0 if is_small else 32)
    if run.requests > (32 if shape == (8192, 1024) else 255):
        return replace(run, experts=run.tp, copies=run.tp, requests=run.requests // run.tp)
    return replace(run, experts=run.tp) if run.requests > most else run


def _vllm_ranks(run: Run) -> Run:
    """Return a run of MiniMax-M2.5 with the ranks that its script starts.

    On B200 in image v0.17.0 it distributes whole experts even for an EP_SIZE of 1. Only the script of B200 in FP4 has
    attention data parallelism, for a single configuration (``dp-attn: true``, whose requests changed on 21 April 2026).
    """
    if run.gpu.startswith("B200") and run.image.startswith("v0.17"):
        return replace(run, experts=run.tp)
    requests = run.copies * run.requests
    is_configuration = run.tp == 2 and run.prompt_tokens == run.output_tokens == 1024
    if run.precision == "fp4" and is_configuration and requests >= (512 if run.date < "2026-04-21" else 256):
        return run
    return replace(run, copies=1, requests=requests)


def settings_of(run: Run) -> tuple[Settings, ...]:
    """Return the settings of a run by InferenceX: with drafts last if two scripts match the row."""
    return {"vllm": _vllm, "trtllm": _trtllm, "sglang": _sglang}[run.engine](run)


def _vllm(run: Run) -> tuple[Settings, ...]:
    if "MiniMax" in run.model and run.gpu.startswith("B200") and not run.image.startswith("v0.17"):
        settings = Settings(has_fp8_kv=True, graph_tokens=_GRAPH_TOKENS)
        if not run.image.startswith("nightly"):  # nightly: its script was not merged, and left both to the engine
            settings = replace(settings, chunk_tokens=2 * run.prompt_tokens, graph_tokens=2048)
        return (settings,)
    if "gpt-oss" in run.model:
        return (Settings(graph_tokens=2048),)
    if "Llama" in run.model and run.gpu.startswith("B200"):
        return (Settings(),)  # cudagraph_mode FULL_DECODE_ONLY
    # In image v0.17.0, VLLM_USE_FLASHINFER_MOE_FP8=0 and VLLM_MOE_USE_DEEP_GEMM=0 leave Triton's kernels on B200.
    return (Settings(graph_tokens=_GRAPH_TOKENS, default_experts=not run.gpu.startswith("B200")),)


def _trtllm(run: Run) -> tuple[Settings, ...]:
    is_short, has_copies = run.prompt_tokens == run.output_tokens == 1024, run.copies > 1
    if "Llama" in run.model:
        waits = is_short and run.tp < 8
        settings = Settings(
            chunk_tokens=16384,
            stream_interval=10,
            wait_iterations=20 if waits else 0,
            wait_tokens=int(0.9 * 16384) if waits else 0,
        )
    elif "gpt-oss" in run.model:  # its attention_dp_config leaves both numbers to the engine
        settings = Settings(
            chunk_tokens=20000,
            stream_interval=20,
            balance_iterations=50 if has_copies else 0,
            gather_iterations=10 if has_copies else 0,
        )
    elif run.image == _MTP_IMAGE or (run.image == _SHARED_IMAGE and run.date >= _FIRST_MTP_DATE):
        drafts, seats = 1 if has_copies else 3, run.requests
        if has_copies and run.image == _MTP_IMAGE and run.precision == "fp4":
            seats = run.requests * run.copies // 4
        # without a lower limit: prompts are computed one by one
        settings = Settings(
            chunk_tokens=_blocks((drafts + 1) * seats + run.prompt_tokens),
            stream_interval=10,
            seats=seats,
            draft_tokens=drafts,
            balance_iterations=_BALANCE_ITERATIONS if has_copies else 0,
            graphs=_graphs(run, drafts=True),
            free_share=0.7 if has_copies and run.precision == "fp8" else 0.8,
        )
    else:
        chunk_tokens = _blocks(run.requests * run.copies + run.prompt_tokens)
        if run.date >= _LEAST_TOKENS_DATE:
            chunk_tokens = max(8192, chunk_tokens)
        waits = is_short and run.precision == "fp8" and run.requests >= 64 and not has_copies
        settings = Settings(
            chunk_tokens=chunk_tokens,
            stream_interval=10,
            wait_iterations=40 if waits else 0,
            wait_tokens=int(0.8 * chunk_tokens) if waits else 0,
            balance_iterations=_BALANCE_ITERATIONS if has_copies else 0,
            graphs=_graphs(run, drafts=False),
            free_share=0.75 if run.precision == "fp8" and run.tp == 4 else 0.8,
        )
    return (replace(settings, keeps_whole=True),)  # no script of these models splits prompts


def _graphs(run: Run, drafts: bool) -> Graphs:
    """Return which iterations of DeepSeek-R1 run in CUDA graphs, by the scripts of images 1.2.0rc6."""
    requests, shape = run.requests, (run.prompt_tokens, run.output_tokens)
    if run.copies > 1 or not run.image.startswith("1.2.0rc6"):
        has_all = False
    elif drafts and run.precision == "fp4":
        has_all = {(1024, 1024): 32 <= requests <= 128, (1024, 8192): requests == 64}.get(shape, False)
    elif drafts:
        has_all = requests > {(1024, 1024): 4, (1024, 8192): 8}.get(shape, 16)
    elif run.precision == "fp4":
        has_all = shape == (1024, 1024) and run.tp == run.experts == 8
    else:
        has_all = requests >= (128 if shape == (1024, 8192) else 64)
    return Graphs.ALL if has_all else Graphs.DECODE


def _blocks(tokens: int) -> int:
    """Return the scripts' max_num_tokens: whole blocks of 64, and one more."""
    return (tokens + 64 + 63) // 64 * 64


def _sglang(run: Run) -> tuple[Settings, ...]:
    often = 10 if run.requests < 16 else 30
    if "Qwen3.5" in run.model:
        plain = Settings(
            chunk_tokens=32768, stream_interval=30, has_fp8_kv=run.precision != "bf16", seats=128,
            poll_iterations=often, static_share=0.82,
        )  # fmt: skip
        # Drafts end the overlap, unless SGLANG_ENABLE_SPEC_V2 is set, as in DeepSeek-R1's script only.
        drafting = replace(plain, stream_interval=1, schedules_ahead=False)
        # The only configuration of four GPUs that slices experts is the one with drafts.
        if run.precision == "fp8" and run.tp == 4 and run.experts == 1:
            return (replace(drafting, draft_tokens=3, seats=None, static_share=0.8),)
        return (plain,)
    if run.precision == "fp4":
        plain = Settings(
            chunk_tokens=16384, stream_interval=10, seats=256, poll_iterations=often, static_share=0.85
        )  # fmt: skip
        return (plain,)
    if run.tp == 4:
        plain = Settings(chunk_tokens=8192, stream_interval=30, seats=32, poll_iterations=10, static_share=0.95)
        return (plain,)
    plain = Settings(chunk_tokens=32768, stream_interval=30, seats=128, poll_iterations=often, static_share=0.82)
    drafting = replace(plain, chunk_tokens=16384, stream_interval=1, seats=512, draft_tokens=2)
    most = 4 if run.prompt_tokens == 8192 else 64  # requests in flight in the configuration without drafts
    if run.image != "v0.5.9-cu130":  # the first image of both scripts
        return (plain,)
    return (plain, drafting) if run.requests <= most else (drafting,)


# --- layers without CUDA graphs, whose kernels Python starts one by one


# Calls of PyTorch in one layer, about two for each kernel that it starts (an output is allocated, a view is made):
# attention and its projections, and the MLP or the experts with their routing.
_CALLS = {Kernel.GROUPED: 14, Kernel.LATENT: 36, Kernel.COMPRESSED: 36, Kernel.RECURRENT: 52}
_MLP_CALLS, _EXPERT_CALLS = 14, 20
# TensorRT-LLM computes latent attention of decoding requests beside that of prompts, with absorbed projections: two
# products, the rotation of queries and attention itself (`forward_absorption_generation` of its attention module).
_ABSORBED_CALLS = 8


def eager_layer_s(engine: str, model: ModelSpec, *, mixes: bool = False, attention_only: bool = False) -> float:
    """Return the least seconds of a layer in an iteration with prompts, in which Python starts every kernel.

    The time of a call is that of an all-reduce started alone, without a CUDA graph, in aiconfigurator-core's tables of
    B200 (SGLang: 29 us; vLLM: 21 us; TensorRT-LLM, which has no such row: the mean of both).

    Args:
        mixes: the iteration has decoding requests, too.
        attention_only: all but attention is in piecewise CUDA graphs. TensorRT-LLM splits them at its operator
            ``mla_custom_op_inplace``, which includes the projections around the latents.
    """
    kernel = Kernel.RECURRENT if Kernel.RECURRENT in model.kernels else model.attention.kernel
    calls = _CALLS[kernel]
    if model.attention.kernel is Kernel.LATENT and mixes:
        calls += _ABSORBED_CALLS
    if not attention_only:
        calls += _EXPERT_CALLS if model.experts else _MLP_CALLS
    return ENGINES[engine].call_s * calls
