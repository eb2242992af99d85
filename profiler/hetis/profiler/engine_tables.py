"""Kernels of engines: what `experts`, `latent` and `linear` share in reading and using them.

A kernel is a frozen dataclass with ``architecture`` and ``origin``; the kernels of a kind are rows of a JSON file
beside this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Protocol, TypeVar

from hetis.profiler.fitting import rounded
from hetis.profiler.roofline import shipped_efficiencies
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Piece, Provenance, Source

NEAREST = "Hopper"  # stands in for architectures without tables


class Kernel(Protocol):
    @property
    def architecture(self) -> str: ...

    @property
    def origin(self) -> str: ...


K = TypeVar("K")


def kernels_in(file: str, kind: Callable[..., K]) -> tuple[K, ...]:
    """Return the kernels in a file of the package."""
    text = resources.files("hetis.profiler").joinpath(file).read_text(encoding="utf-8")
    return tuple(kind(**fields) for fields in json.loads(text)["kernels"])


def below_peak(piece: Piece, flops: float) -> tuple[Piece, ...]:
    """Return the pieces of a kernel that its ``piece`` describes and that reaches at most ``flops`` per second.

    Where memory bounds every row of a table, its fit leaves FLOPs next to nothing. On a GPU with much bandwidth for its
    FLOPs (H20), and for more work than the table has, these bound the kernel.
    """
    roof = Piece(fixed_s=piece.fixed_s, flop_s=rounded(1.0 / flops))
    return (piece,) if piece.flop_s >= roof.flop_s else (piece, roof)


def provenance_of(kernel: Kernel, gpu: GpuType) -> Provenance:
    """Return the provenance of a kernel's fit on ``gpu``.

    On the GPU of its table, which the origin names, no error is stated, because plans use it beside other fits. Other
    GPUs, of the same architecture, too, have the range that dense products of GPUs never seen have.
    """
    relative = "" if kernel.architecture == gpu.architecture else f"; scaled from {kernel.architecture}"
    is_measured = f" on {gpu.name}," in kernel.origin
    unseen = None if is_measured else shipped_efficiencies().architectures[NEAREST].ops["dense"].range_error
    return Provenance(source=Source.MODELLED, origin=f"{kernel.origin}{relative}", range_error=unseen)
