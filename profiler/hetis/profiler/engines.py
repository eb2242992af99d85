"""The time that each serving engine's host adds to an iteration, and profiles adapted to an engine.

Kernels are measured on their own, but a served token also waits for the engine to schedule, sample, detokenise and
respond. That time grows with the sequences of an iteration and hardly depends on the GPU. A profile itself contains
only the minimum (a sampler's launch, all else overlapped); ``for_engine`` adds what a named engine really takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hetis.profiler.experts import expert_fits
from hetis.profiler.latent import LATENT_HEADS, latent_fits
from hetis.profiler.linear import linear_fits
from hetis.solver.cluster import GpuType
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plugin_time import PluginTime
from hetis.solver.profile import Fit, Mixed, Op, Piece, Profile, Provenance, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTime:
    """Seconds that the host takes for an iteration, and for every sequence in it.

    ``call_s`` is the time of one call of PyTorch where an engine runs prompts without CUDA graphs. It lengthens
    iterations with short prompts only (``benchmarks/accuracy/published_settings.py``); ``outside_s`` passes outside
    of iterations, before a request's first token; neither is part of a profile.
    """

    step_s: float
    sequence_s: float
    call_s: float
    origin: str
    outside_s: float = 0.0


_VIDUR = (
    "microsoft/vidur (MIT) CPU overheads, A100 hosts: least squares over the batch of schedule, prepare inputs, "
    "sampler and process model outputs"
)
_UNDER_LOAD = (
    "vLLM 0.15, which schedules asynchronously (the default since 0.14): least error of inter-token latency in load "
    "stages of Llama-3.1-8B on H100 (docs/accuracy.md)"
)
_CALIBRATED = (
    "least mean absolute error over the serving points of Qwen3-32B and Llama-3.1-8B on H100 (docs/accuracy.md)"
)
UNHIDDEN = HostTime(step_s=1.43e-3, sequence_s=41.7e-6, call_s=21e-6, origin=_VIDUR)  # vLLM that waits for its host
ENGINES: Mapping[str, HostTime] = {
    "vllm": HostTime(step_s=0.6e-3, sequence_s=25e-6, call_s=21e-6, outside_s=5.8e-3, origin=_UNDER_LOAD),
    "sglang": HostTime(step_s=0.8e-3, sequence_s=25e-6, call_s=29e-6, origin=_CALIBRATED),
    "trtllm": HostTime(step_s=0.6e-3, sequence_s=30e-6, call_s=25e-6, origin=_CALIBRATED),
}
# vLLM 0.32 on an H100 host, medians of decode steps of 32 layers and 32 requests (docs/vllm.md, "On a GPU"): 11.1 ms by
# itself, 20.0 ms with the plugin and every head local. Of the 8.9 ms between, 1.36 are asynchronous scheduling, which
# the plugin does without. An exchange took 0.15 ms per layer for 8 sequences and 0.5 for 256; the value is their
# geometric mean.
PLUGINS: Mapping[str, PluginTime] = {
    "vllm-hetis": PluginTime(
        local_s=0.235e-3, exchange_s=0.274e-3, exchange_low_s=0.15e-3, exchange_high_s=0.5e-3,
        step_s=UNHIDDEN.step_s - ENGINES["vllm"].step_s, sequence_s=UNHIDDEN.sequence_s - ENGINES["vllm"].sequence_s,
        source="vLLM 0.32 with the plugin on an H100 host (docs/vllm.md)",
    )
}  # fmt: skip
# Architectures on which vLLM computes grouped-query attention with FlashAttention 2, with one kernel for chunks and
# decoding requests. Beside a chunk, it neither packs the query heads of a group nor splits long contexts.
_FLASH_ATTENTION_2 = ("Ampere", "Ada", "Ada GeForce", "RTX Blackwell")
_MIXED = Mixed(
    factor=2.0,
    provenance=Provenance(
        source=Source.MODELLED,
        origin="FlashAttention 2 of vLLM 0.19, 1.65 to 2.9 in LLMServingSim's tables of two GPUs (docs/accuracy.md)",
    ),
)


def for_engine(
    profile: Profile, gpu: GpuType, engine: str, *, stream_interval: int = 1, whole_experts: bool = False,
    default_backend: bool = True, schedules_ahead: bool = True,
) -> Profile:  # fmt: skip
    """Return the profile of ``gpu`` with the host time of ``engine``, and its kernels of experts, latent attention and
    linear attention. Raises InvalidProblemError if the engine was not measured, or the interval is below 1.

    Args:
        stream_interval: tokens of a request that are returned together; a sequence takes its time once for all of them.
        whole_experts: ranks share out whole experts (expert parallelism) instead of having slices of each.
        default_backend: experts run in the kernels that the engine's recipes choose, see `expert_fits`.
        schedules_ahead: iterations do not wait for the host (vLLM's asynchronous scheduling, the default since 0.14).
    """
    if stream_interval < 1:
        raise InvalidProblemError(f"stream_interval is {stream_interval}, must be >= 1")
    host = ENGINES.get(engine) if schedules_ahead or engine != "vllm" else UNHIDDEN
    if host is None:
        raise InvalidProblemError(f"no host times are known for engine {engine!r}; known: {', '.join(ENGINES)}")
    provenance = Provenance(source=Source.MODELLED, origin=f"{engine}: {host.origin}")
    fits = [fit for fit in profile.fits if fit.op not in (Op.EXPERTS, Op.STEP, Op.SAMPLE)]
    fits = [fit for fit in fits if fit.scope.queries_per_group not in LATENT_HEADS]
    fits = [fit for fit in fits if fit.op is not Op.PREFILL_ATTENTION or fit.scope.state_flops is None]
    mixed = _MIXED if engine == "vllm" and gpu.architecture in _FLASH_ATTENTION_2 else None
    fits = [replace(fit, mixed=mixed) if _has_no_measured_factor(fit) else fit for fit in fits]
    fits += linear_fits(gpu, replace(profile, fits=tuple(fits)), engine)
    fits += expert_fits(gpu, profile, engine, whole=whole_experts, default_backend=default_backend)
    fits += latent_fits(gpu, profile, engine)
    fits.append(Fit(op=Op.STEP, pieces=(Piece(fixed_s=host.step_s),), provenance=provenance))
    fits.append(Fit(op=Op.SAMPLE, pieces=(Piece(token_s=host.sequence_s / stream_interval),), provenance=provenance))
    return replace(profile, fits=tuple(fits))


def _has_no_measured_factor(fit: Fit) -> bool:
    is_measured = fit.mixed is not None and fit.mixed.provenance.source is not Source.MODELLED
    return fit.op is Op.DECODE_ATTENTION and not is_measured
