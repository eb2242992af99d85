"""The attention backend of replicas that exchange KV, where an engine would choose several.

Engines choose attention kernels by GPU, and refuse KV from others. vLLM's NIXL connector compares the backends' names
(`compute_nixl_compatibility_hash` in nixl/metadata.py), SGLang the sizes of pages (`try_ensure_parallel_info` in
disaggregation/common/conn.py), of which its choice for B200 has another. So replicas on unlike GPUs are told a backend
that runs on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from hetis.engines.gpus import GpuKind
from hetis.solver.model import ModelSpec

_DATACENTER_BLACKWELL = 10  # the major capability of B200 and B300
_FLASHINFER_HEADS = (64, 128, 256)


def common_backend(model: ModelSpec, kinds: Iterable[GpuKind], engine: str) -> str | None:
    """Return the backend to tell an engine so that all these GPUs have the same.

    Empty: by itself it chooses the same on all of them. None: there is none that runs on all. Engines other than
    ``sglang`` are vLLM, with the plugin or without.
    """
    capabilities = {kind.capability for kind in kinds if kind.capability is not None}
    if not capabilities:  # of GPUs on which nothing is recorded
        return ""
    if engine == "sglang":
        return _of_sglang(model, capabilities)
    majors = set(map(int, capabilities))
    if model.indexer is not None:
        # On Hopper and B200 vLLM's choice goes by the heads of a rank, too, so that it differs on equal GPUs.
        return "" if majors == {12} else "FLASHMLA_SPARSE" if majors <= {9, _DATACENTER_BLACKWELL} else None
    if len(capabilities) < 2:
        return ""
    if model.mla is not None:
        # The choice everywhere but on Hopper and B200, whose own run on these alone.
        return "TRITON_MLA" if majors & {9, _DATACENTER_BLACKWELL} else ""
    if min(capabilities) < 8 or _has_sinks(model) or _sees_images_at_once(model):
        return "TRITON_ATTN"
    if model.kv_bytes == 2 and model.head_dim <= 256:  # FLASH_ATTN is the choice everywhere but on B200
        if _DATACENTER_BLACKWELL not in majors:
            return ""
        # There its pages have 128 tokens if heads have 256 numbers, and 16 elsewhere.
        return "FLASH_ATTN" if model.head_dim < 256 else "TRITON_ATTN"
    # Of FP8, FlashAttention reads heads of up to 128 numbers on Blackwell, and none below Hopper.
    return "FLASHINFER" if model.head_dim in _FLASHINFER_HEADS else "TRITON_ATTN"


def _of_sglang(model: ModelSpec, capabilities: set[float]) -> str:
    """Return a backend with pages of one token: trtllm_mha and trtllm_mla, which B200 gets, have larger ones.

    Read in 0.5.23: `get_default_attn_backend` in srt/arg_groups/model_override_base.py.
    """
    if model.indexer is not None or len({int(one) == _DATACENTER_BLACKWELL for one in capabilities}) < 2:
        return ""
    # gpt-oss, Llama-4 and Qwen3.5 take no flashinfer, nor does latent attention below Hopper.
    no_flashinfer = model.sliding_window is not None or model.linear is not None
    return "triton" if no_flashinfer or (model.mla is not None and min(capabilities) < 9) else "flashinfer"


def _has_sinks(model: ModelSpec) -> bool:
    """Return whether it is gpt-oss, whose attention has sinks, by windows that no other model of the catalogue has."""
    return model.sliding_window == 128


def _sees_images_at_once(model: ModelSpec) -> bool:
    """Return whether an image's tokens see each other, as in Gemma-3: a vision tower beside sliding windows."""
    return model.vision_params > 0 and model.sliding_window is not None
