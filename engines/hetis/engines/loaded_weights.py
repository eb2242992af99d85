"""Weights as engines load them, beyond their size as stored and divided among ranks."""

from __future__ import annotations

import math

from hetis.solver.cluster import GpuType
from hetis.solver.model import Kernel, ModelSpec
from hetis.solver.model.attention import Latent


def bytes_beyond_stored(model: ModelSpec, gpu: GpuType, tp: int, attention_dp: int = 1) -> float:
    """Return the bytes of a repeated layer on one of ``tp`` ranks beyond its share of those stored."""
    return _padding(model, gpu, tp * attention_dp) + _copies(model, tp)


def _padding(model: ModelSpec, gpu: GpuType, ranks: int) -> float:
    """Return by how much kernels for MXFP4 pad experts.

    They pad the hidden and intermediate sizes, Marlin's and TensorRT-LLM's to multiples of 256 and 128, AMD's both to
    256 (vLLM 0.32, `mxfp4_round_up_hidden_size_and_intermediate_size` in fused_moe/oracle/mxfp4.py).
    """
    if model.weights != "mxfp4" or model.experts is None:
        return 0.0
    experts, hidden = model.experts, 256 * math.ceil(model.hidden / 256)
    inner = experts.width / ranks
    multiple = 256 if gpu.vendor == "AMD" else 128
    padded = hidden * multiple * math.ceil(inner / multiple) / (model.hidden * inner)
    stored = model.expert_share * experts.count * model.expert_params() * 0.53125 / ranks
    return stored * (padded - 1.0)


def _copies(model: ModelSpec, tp: int) -> float:
    """Return the bytes of what every rank holds whole, and of latent attention's expansions a second time, in 16 bits.

    Ranks do not divide routers (``ReplicatedLinear``) and projections to what all heads share. The expansions of keys
    and values are kept as loaded and as two factors (vLLM 0.32, `process_weights_after_loading` in
    model_executor/layers/attention/mla_attention.py). Formats of 4 bits are those of experts, beside 16 bits.
    """
    size = 2.0 if model.weight_bytes < 1.0 else model.weight_bytes
    copied = expanded = 0.0
    for mixer, count in model.mixers:
        copied += count / model.num_layers * mixer.copied_params(model.hidden)
        if isinstance(mixer, Latent) and mixer.kernel is Kernel.LATENT:
            factors = mixer.query_heads * mixer.kv_lora_rank * (mixer.qk_nope_head_dim + mixer.v_head_dim)
            expanded += count / model.num_layers * factors / tp
    routers = 0.0 if model.experts is None else model.expert_share * model.hidden * model.experts.count
    return (1.0 - 1.0 / tp) * (copied * size + routers * 2.0) + 2.0 * expanded
