"""The attention backend for replicas that exchange KV, where engines would choose different ones.

Engines choose attention kernels by GPU, and reject KV written for other kernels. vLLM's NIXL connector compares
backend names (`compute_nixl_compatibility_hash` in nixl/metadata.py); SGLang compares page sizes
(`try_ensure_parallel_info` in disaggregation/common/conn.py), and its default backend on B200 has a different one.
Replicas on different GPUs are therefore configured with one backend that runs on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hetis.engines.gpus import GpuKind
from hetis.solver.model import Kernel, ModelSpec
from hetis.solver.problem import kernel_of_any_vendor

# Vendors on whose GPUs vLLM runs Triton's attention kernels (`get_attn_backend_cls` in vllm/platforms), whose KV is
# alike wherever they run. Moreh (H100 and MI300X) and Mooncake have sent KV from one vendor to another.
KV_VENDORS: Mapping[str, tuple[str, ...]] = dict.fromkeys(("vllm", "vllm-hetis"), ("NVIDIA", "AMD", "Intel"))
TRITON_FP8 = 8.9  # lowest compute capability with Triton's FP8
_DATACENTER_BLACKWELL = 10  # major compute capability of B200 and B300
_FLASHINFER_HEADS = (64, 128, 256)
# Gemma 3's tokens of an image (``mm_tokens_per_image``, the same in all sizes), and its marks and line breaks around.
_IMAGE_TOKENS = 256 + 4


def common_backend(model: ModelSpec, kinds: Iterable[GpuKind], engine: str) -> str | None:
    """Return the attention backend to set on an engine so that all these GPUs use the same one.

    Empty: all of them use the same one by default. None: no backend runs on all of them. Every engine other than
    ``sglang`` is vLLM, with or without the plugin.
    """
    kinds = tuple(kinds)
    if len(vendors := {kind.vendor for kind in kinds}) > 1:
        return _between(vendors, model, engine)
    capabilities = {kind.capability for kind in kinds if kind.capability is not None}
    if not capabilities:  # nothing is recorded about any of the GPUs
        return ""
    if engine == "sglang":
        return _of_sglang(model, capabilities)
    majors = set(map(int, capabilities))
    if model.kernel is Kernel.COMPRESSED:  # FlashInfer on RTX Blackwell, FlashMLA elsewhere (`_select_dsv4_attn_cls`)
        return "" if len({major == 12 for major in majors}) < 2 else None
    if model.kernel is Kernel.SPARSE:
        # On Hopper and B200 vLLM's choice also depends on the heads per rank, so it can differ between identical GPUs.
        return "" if majors == {12} else "FLASHMLA_SPARSE" if majors <= {9, _DATACENTER_BLACKWELL} else None
    if len(capabilities) < 2:
        return ""
    if model.kernel is Kernel.LATENT:
        # TRITON_MLA is the default everywhere except on Hopper and B200, whose own defaults run only there.
        return "TRITON_MLA" if majors & {9, _DATACENTER_BLACKWELL} else ""
    if min(capabilities) < 8 or _only_triton(model):
        return _triton(model, capabilities)
    if model.kv_bytes == 2 and model.head_dim <= 256:  # FLASH_ATTN is the default everywhere except on B200
        if _DATACENTER_BLACKWELL not in majors:
            return ""
        # On B200 its pages hold 128 tokens for a head dimension of 256; on other GPUs they hold 16.
        return "FLASH_ATTN" if model.head_dim < 256 else "TRITON_ATTN"
    # FlashAttention reads FP8 KV with head dimensions of up to 128 on Blackwell, and not at all below Hopper.
    return "FLASHINFER" if model.head_dim in _FLASHINFER_HEADS else _triton(model, capabilities)


def _between(vendors: set[str], model: ModelSpec, engine: str) -> str | None:
    """Return the backend whose KV GPUs of several vendors keep alike, or None if there is none."""
    kernel = kernel_of_any_vendor(model) if vendors <= set(KV_VENDORS.get(engine, ())) else None
    return None if kernel is None else {Kernel.GROUPED: "TRITON_ATTN", Kernel.LATENT: "TRITON_MLA"}[kernel]


def reads_fp8_by_triton(model: ModelSpec) -> bool:
    """Return whether vLLM reads FP8 KV of grouped-query attention on Ampere by Triton, as FlashInfer has no kernel."""
    return _only_triton(model) or model.head_dim not in _FLASHINFER_HEADS


def _only_triton(model: ModelSpec) -> bool:
    """Return whether no other backend runs on GPUs before Hopper."""
    return has_sinks(model) or _sees_images_at_once(model)


def _triton(model: ModelSpec, capabilities: set[float]) -> str | None:
    """Return TRITON_ATTN, or None if GPUs below Ada are to read FP8 KV by it (`TritonAttentionImpl` refuses them)."""
    return "TRITON_ATTN" if model.kv_bytes == 2 or min(capabilities) >= TRITON_FP8 else None


def _of_sglang(model: ModelSpec, capabilities: set[float]) -> str:
    """Return a backend with pages of one token: trtllm_mha and trtllm_mla, the defaults on B200, have larger pages.

    As in SGLang 0.5.23: `get_default_attn_backend` in srt/arg_groups/model_override_base.py.
    """
    is_sparse = model.kernel in (Kernel.SPARSE, Kernel.COMPRESSED)  # each has kernels of its own
    if is_sparse or len({int(one) == _DATACENTER_BLACKWELL for one in capabilities}) < 2:
        return ""
    # gpt-oss, Llama-4 and Qwen3.5 do not support flashinfer, nor does latent attention below Hopper.
    no_flashinfer = model.sliding_window is not None or Kernel.RECURRENT in model.kernels
    no_flashinfer |= model.kernel is Kernel.LATENT and min(capabilities) < 9
    return "triton" if no_flashinfer else "flashinfer"


def has_sinks(model: ModelSpec) -> bool:
    """Return whether the model is gpt-oss, which has attention sinks, by a window that is unique in the catalogue."""
    return model.sliding_window == 128


def image_tokens(model: ModelSpec) -> int:
    """Return how many prompt tokens vLLM does not divide among iterations: those of an image. 0: it divides all.

    It divides none whose tokens attend to each other (``disable_chunked_mm_input``), and does not start unless an
    iteration has room for them (`compute_mm_encoder_budget` in vllm/v1/core/encoder_cache_manager.py).
    """
    return _IMAGE_TOKENS if _sees_images_at_once(model) else 0


def attends_to_chunks(model: ModelSpec) -> bool:
    """Return whether the model is a Llama 4, whose chunks a `ModelSpec` has as windows of their size.

    Told from windows by what no other family has: engines keep the KV behind them although other layers have none, and
    a token activates a single expert beside a shared one.
    """
    keeps_all = not model.windows_free_kv and 0.0 < model.sliding_share < 1.0
    one = model.experts
    return keeps_all and one is not None and one.active == 1 and one.shared_width == one.width


def _sees_images_at_once(model: ModelSpec) -> bool:
    """Return whether an image's tokens attend to each other (``is_mm_prefix_lm`` in vLLM), which is so of Gemma 3.

    Told by a vision tower beside windows in some layers. A Llama 4 has a tower beside chunks, and a Mistral 3 may have
    one beside windows in all layers; the tokens of their images attend to those before them.
    """
    has_windows_in_some = 0.0 < model.sliding_share < 1.0 and not attends_to_chunks(model)
    return model.vision_params > 0 and has_windows_in_some
