"""The properties of a GPU type that engines depend on: its vendor, CUDA compute capability, and reported memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hetis.formats import catalogue
from hetis.solver.cluster import GpuType

VENDORS = ("NVIDIA", "AMD")  # vendors supported for starting processes: CUDA_VISIBLE_DEVICES selects the GPUs of both
# CUDA compute capability of the architectures in the catalogue; the lowest, where an architecture has several.
CAPABILITIES: Mapping[str, float] = {
    "Pascal": 6.0,
    "Volta": 7.0,
    "Turing": 7.5,
    "Ampere": 8.0,
    "Ada": 8.9,
    "Ada GeForce": 8.9,
    "Hopper": 9.0,
    "Blackwell": 10.0,
    "RTX Blackwell": 12.0,
}
BFLOAT16 = 8.0  # lowest compute capability with bfloat16
_BY_ARCHITECTURE = {architecture.casefold(): capability for architecture, capability in CAPABILITIES.items()}
# GiB of a GPU as torch and nvidia-smi report them; logs of vLLM ("total_gpu_memory (23.58GiB)") and tables of
# nvidia-smi. Driver and ECC keep the rest. Types that are missing lose as much as those with HBM do.
REPORTED_GIB: Mapping[str, float] = {
    "P100-PCIe-12GB": 11.9, "P100-PCIe-16GB": 15.89, "P100-SXM2-16GB": 15.89, "V100-PCIe-16GB": 15.77,
    "V100-SXM2-16GB": 15.77, "V100-PCIe-32GB": 31.73, "V100-SXM2-32GB": 31.73, "T4": 14.57,
    "RTX-2080Ti": 10.57, "RTX-3090": 23.58, "RTX-4090": 23.53, "RTX-5090": 31.36, "A10": 22.0, "A10G": 22.0,
    "A30": 23.5, "A40": 44.35, "RTX-A4000": 15.6, "RTX-A5000": 23.55, "RTX-A6000": 47.43, "L4": 22.03,
    "L20": 44.4, "L40": 44.39, "L40S": 44.39, "RTX-6000-Ada": 47.4, "A100-PCIe-40GB": 39.39,
    "A100-SXM-40GB": 39.39, "A100-PCIe-80GB": 79.2, "A100-SXM-80GB": 79.2, "A800-SXM-80GB": 79.2, "H20": 95.0,
    "H800-SXM-80GB": 79.18, "H100-PCIe-80GB": 79.18, "H100-SXM-80GB": 79.18, "H100-NVL-94GB": 93.0,
    "H200-SXM-141GB": 139.8, "H200-NVL-141GB": 139.8, "GH200-96GB": 94.5, "B200-SXM-180GB": 178.35,
    "B300-SXM-288GB": 267.7, "GB200-per-GPU": 184.0, "RTX-PRO-6000-Server-96GB": 94.97,
    "MI300X-192GB": 191.98, "MI325X-256GB": 255.98, "MI355X-288GB": 287.98,
}  # fmt: skip
_REPORTED_SHARE = 0.985


class GpuKind(NamedTuple):
    vendor: str
    capability: float | None  # None: not recorded


def common_dtype(kinds: Iterable[GpuKind]) -> str:
    """Return the dtype to set on an engine so that all these GPUs compute in the same one; ``auto``: its own choice.

    By default each node of vLLM and SGLang uses float16 below compute capability 8.0, and the checkpoint's bfloat16
    from there on (`supported_dtypes` in vllm/platforms/cuda.py). GPUs without a recorded capability count as having
    bfloat16.
    """
    lacks_bfloat16 = any(kind.capability is not None and kind.capability < BFLOAT16 for kind in kinds)
    return "float16" if lacks_bfloat16 else "auto"


def kinds_in(cluster: Any) -> dict[str, GpuKind]:
    """Return the kinds of the GPU types that a fleet document defines itself."""
    types = cluster.get("gpu_types") if isinstance(cluster, Mapping) else None
    parts = types if isinstance(types, Mapping) else {}
    return {
        name: kind_by(name, str(part.get("architecture")), part.get("vendor"))
        for name, part in parts.items()
        if isinstance(part, Mapping)
    }


def kind_of(gpu: str, own: Mapping[str, GpuKind]) -> GpuKind:
    """Return the kind of a GPU type, from ``own`` or the catalogue; without an entry, NVIDIA of unknown capability."""
    try:
        found = catalogue.find_gpu(gpu).gpu
    except catalogue.UnknownNameError:
        return own.get(gpu, GpuKind("NVIDIA", None))
    return own.get(gpu, kind_of_type(found))


def kind_of_type(gpu: GpuType) -> GpuKind:
    """Return the kind of a GPU type from the catalogue or a fleet document."""
    return kind_by(gpu.name, gpu.architecture, gpu.vendor)


def kind_by(name: str, architecture: str, vendor: Any) -> GpuKind:
    """Return the kind of a GPU type from its fields; if no vendor is given, the vendor of its architecture."""
    capability = _BY_ARCHITECTURE.get(catalogue.architecture_of(name, architecture).casefold())
    return GpuKind(catalogue.vendor_named(str(vendor)) if vendor else catalogue.vendor_of(architecture), capability)


def reported_bytes(gpu: GpuType) -> int:
    """Return the bytes of a GPU that its tools report."""
    known = REPORTED_GIB.get(gpu.name)
    return int(gpu.memory_bytes * _REPORTED_SHARE if known is None else min(known * 2**30, gpu.memory_bytes))
