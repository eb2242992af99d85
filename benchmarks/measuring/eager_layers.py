"""The host's time for a layer whose kernels Python starts one by one, without CUDA graphs."""

from __future__ import annotations

from hetis.profiler.engines import ENGINES
from hetis.solver.model import Kernel, ModelSpec

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
