"""The properties of a GPU type that engines depend on: its vendor and its CUDA compute capability."""

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
