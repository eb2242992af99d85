"""The attention backend of replicas that exchange KV, where an engine would choose several.

Engines choose attention kernels by GPU and refuse KV from others. vLLM's NIXL connector compares the names
(`compute_nixl_compatibility_hash` in nixl/metadata.py), SGLang the page sizes (`try_ensure_parallel_info` in
disaggregation/common/conn.py), of which its choice for B200 has another.
"""

from __future__ import annotations

from collections.abc import Collection

from hetis.engines.precision import CAPABILITIES
from hetis.formats import catalogue
from hetis.solver.model import ModelSpec

_DATACENTER_BLACKWELL = 10  # the major capability of B200 and B300; workstation cards have 12
_FLASHINFER_HEADS = (64, 128, 256, 512)
_GROUPED = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
_LATENT = ("FLASH_ATTN_MLA", "FLASHINFER_MLA", "FLASHMLA", "TRITON_MLA")
_SPARSE = ("FLASH_ATTN_MLA_SPARSE", "FLASHINFER_MLA_SPARSE", "FLASHMLA_SPARSE")


def common_backend(model: ModelSpec, gpus: Collection[str], engine: str) -> str:
    """Return the backend that an engine must be told so that GPU types have the same; empty: they have.

    Also empty for GPUs of which nothing is recorded. ``engine``: ``vllm`` or ``sglang``.
    """
    capabilities = {found for name in gpus if (found := capability_of(name)) is not None}
    if engine == "sglang":
        # trtllm_mha and trtllm_mla, its choice for B200, have pages of 64 tokens, the other choices pages of one.
        return "flashinfer" if len({int(one) == _DATACENTER_BLACKWELL for one in capabilities}) > 1 else ""
    if len({_choice(model, one) for one in capabilities}) < 2:
        return ""
    return next((one for one in _backends(model) if all(is_run(one, model, at) for at in capabilities)), "")


def capability_of(gpu: str) -> float | None:
    """Return CUDA's compute capability of a GPU type of the catalogue; None: not recorded."""
    try:
        found = catalogue.find_gpu(gpu).gpu
    except catalogue.UnknownNameError:
        return None
    if found.architecture == "Blackwell" and found.name.startswith("RTX-"):
        return 12.0
    return CAPABILITIES.get(found.architecture)


def _choice(model: ModelSpec, capability: float) -> str:
    """Return what vLLM 0.32 chooses by itself (`_get_backend_priorities` in vllm/platforms/cuda.py)."""
    return next((name for name in order_of(model, capability) if is_run(name, model, capability)), "")


def order_of(model: ModelSpec, capability: float) -> list[str]:
    """Return the backends in the order in which vLLM tries them."""
    flashinfer_first = int(capability) == _DATACENTER_BLACKWELL
    return sorted(_backends(model), key=lambda name: flashinfer_first and not name.startswith("FLASHINFER"))


def _backends(model: ModelSpec) -> tuple[str, ...]:
    if model.indexer is not None:
        return _SPARSE
    return _GROUPED if model.mla is None else _LATENT


def is_run(backend: str, model: ModelSpec, capability: float) -> bool:
    """Return whether vLLM runs a backend, by its `supports_compute_capability`, heads and dtypes of KV."""
    major, is_16_bit = int(capability), model.kv_bytes == 2
    has_sinks = model.weights == "mxfp4"  # gpt-oss
    return {
        # fp8 and sinks take FlashAttention 3 or 4
        "FLASH_ATTN": major in (9, 10) if has_sinks or not is_16_bit else major >= 8,
        "FLASHINFER": model.head_dim in _FLASHINFER_HEADS and (major == 10 if has_sinks else major >= 8),
        "FLASH_ATTN_MLA": is_16_bit and major == 9,
        "FLASHINFER_MLA": major == 10,
        "FLASHMLA": major in (9, 10),
        "FLASH_ATTN_MLA_SPARSE": major == 9,
        "FLASHINFER_MLA_SPARSE": major == 10,
        "FLASHMLA_SPARSE": major in (9, 10),
    }.get(backend, True)  # Triton's run everywhere
