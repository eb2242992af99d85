"""Profiles for GPUs without measurements: a roofline of the GPU's peaks and its architecture's efficiencies.

Efficiencies are coefficients relative to a GPU's peaks, with error and origin. ``tools/efficiency.py`` writes their
file, which is package data (``efficiency.json``). Nothing here needs numpy, so reading it costs next to nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from hetis.formats.models.dtypes import BYTES_PER_PARAMETER
from hetis.solver.cluster import GpuType
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Fit, FitScope, Op, Piece, Profile, Provenance, Source

VERSION = "hetis-efficiency/v1"
NVFP4_BYTES = BYTES_PER_PARAMETER["nvfp4"]
# The four-bit format in which an architecture multiplies weights and activations; int4 weights become 16 bits first.
FOUR_BIT_BYTES = {"Blackwell": NVFP4_BYTES, "RTX Blackwell": NVFP4_BYTES, "CDNA4": BYTES_PER_PARAMETER["mxfp4"]}
# Dense four-bit rates that are not twice the eight-bit ones. GeForce halves eight-bit products with fp32 accumulation,
# and not four-bit ones (NVIDIA's RTX Blackwell white paper). Blackwell Ultra is not here: by its data sheet it has 1.5
# times Blackwell's rate, but NVFP4 kernels of three engines are only 1.06 to 1.20 times as fast on B300 and GB300 as on
# B200 and GB200 (median of products with all sizes >= 4,096, gemm tables of aiconfigurator-core 0.12.0), and we use
# B200's share.
FP4_FLOPS = {"RTX-5090": 1676e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class RelativePiece:
    """One affine piece in units of the device's peaks; 1.25 means that 80% of a peak is reached."""

    fixed_s: float = 0.0
    flop: float = 0.0  # times the time of the FLOPs at the peak matrix rate
    byte: float = 0.0  # times the time of the bytes at the peak memory bandwidth
    token_bytes: float = 0.0  # bytes per token, at the peak memory bandwidth
    head_bytes: float = 0.0  # bytes per query head, at the peak memory bandwidth
    wire: float = 0.0  # times the time on the nominal wire

    def at(self, *, flops: float, bytes_per_s: float) -> Piece:
        """Return the piece on a device with these peaks."""
        return Piece(
            fixed_s=self.fixed_s,
            flop_s=self.flop / flops,
            byte_s=self.byte / bytes_per_s,
            token_s=self.token_bytes / bytes_per_s,
            head_s=self.head_bytes / bytes_per_s,
            wire=self.wire,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpEfficiency:
    """One operator's coefficients, with what is known about their error (mean absolute percentage, 0.1 is 10%)."""

    pieces: tuple[RelativePiece, ...]
    origin: str  # tables, engines, kernels
    measured_on: tuple[str, ...] = ()  # GPU names as in the catalogue
    num_points: int = 0
    fitted_mape: float | None = None
    held_out_mape: float | None = None  # error on shapes the fit never saw; for links, on hosts it never saw
    transfer_mape: float | None = None  # error on GPUs the fit never saw: each measured GPU by the fits of the others
    range_error: float | None = None  # 0.5: nine in ten times of GPUs never seen lie within 1/1.5 and 1.5 times these
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The operators of one GPU architecture: its own, or those of a relative where it has none (`scaled_from`)."""

    name: str
    ops: Mapping[str, OpEfficiency]
    relative: str | None = None  # None: measured
    compute_factor: float = 1.0  # factor of the relative's share of the peak that FLOPs take
    reason: str = ""  # why this relative, and what is assumed in addition


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRule:
    """The share of nominal memory that an engine may use, and what it reserves of that."""

    usable_ratio: float
    reserve_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiencies:
    """The content of the file."""

    memory: MemoryRule
    links: Mapping[str, OpEfficiency]  # operators that depend on the link, not on the architecture
    architectures: Mapping[str, Architecture]


def modelled_profile(gpu: GpuType, efficiencies: Efficiencies | None = None) -> Profile:
    """Return the roofline of ``gpu``: the catalogue's peaks times ``efficiencies``, or those in the package if None.
    Raises InvalidProblemError if no efficiencies are known for the architecture of ``gpu``.
    """
    efficiencies = efficiencies or shipped_efficiencies()
    arch = efficiencies.architectures.get(gpu.architecture)
    if arch is None:
        known = ", ".join(efficiencies.architectures)
        raise InvalidProblemError(f"{gpu.name}: no efficiencies for architecture {gpu.architecture!r}; known: {known}")
    suffix = "" if arch.relative is None else f"; scaled from {arch.relative}"

    def fit(op: Op, efficiency: OpEfficiency, origin: str, flops: float, scope: FitScope | None = None) -> Fit:
        # The error is that for unseen GPUs unless this one was measured.
        was_measured = gpu.name in efficiency.measured_on
        provenance = Provenance(
            source=Source.MODELLED,
            origin=f"roofline of {gpu.name}, {origin}",
            held_out_mape=efficiency.held_out_mape if was_measured else efficiency.transfer_mape,
            range_error=None if was_measured else efficiency.range_error,
        )
        pieces = tuple(piece.at(flops=flops, bytes_per_s=gpu.mem_bytes_per_s) for piece in efficiency.pieces)
        return Fit(op=op, pieces=pieces, provenance=provenance, scope=scope or FitScope())

    def own(op: Op, name: str, flops: float = gpu.fp16_flops, scope: FitScope | None = None) -> Fit:
        origin = f"efficiencies of {arch.name} calibrated on {arch.ops[name].origin}{suffix}"
        return fit(op, arch.ops[name], origin, flops, scope)

    def of_link(op: Op, name: str) -> Fit:
        return fit(op, efficiencies.links[name], efficiencies.links[name].origin, gpu.fp16_flops)

    has_nvlink = gpu.nvlink_bytes_per_s is not None
    fits = [
        own(Op.DENSE, "dense"),
        own(Op.PREFILL_ATTENTION, "prefill_attention"),
        own(Op.DECODE_ATTENTION, "decode_attention"),
        own(Op.ALL_REDUCE, "all_reduce_nvlink") if has_nvlink else of_link(Op.ALL_REDUCE, "all_reduce_pcie"),
        of_link(Op.TRANSFER, "transfer"),
        of_link(Op.STEP, "step"),
    ]
    if gpu.fp8_flops is not None:  # fp8 weights and activations on the fp8 matrix units
        fits.append(own(Op.DENSE, "dense_fp8", gpu.fp8_flops, FitScope(weight_bytes=1.0)))
        if (four_bits := FOUR_BIT_BYTES.get(gpu.architecture)) is not None:
            name = "dense_nvfp4" if "dense_nvfp4" in arch.ops else "dense_fp8"
            fits.append(own(Op.DENSE, name, matrix_flops(gpu, four_bits), FitScope(weight_bytes=four_bits)))
    return Profile(
        gpu=gpu.name,
        usable_bytes=int(gpu.memory_bytes * efficiencies.memory.usable_ratio),
        reserve_bytes=efficiencies.memory.reserve_bytes,
        fits=tuple(fits),
    )


def matrix_flops(gpu: GpuType, weight_bytes: float | None) -> float:
    """Return the peak matrix rate for weights of ``weight_bytes`` each. None: 16 bits.

    Four-bit products run at twice the rate of eight-bit ones, or at that of the GPU's data sheet.
    """
    if weight_bytes is None or weight_bytes > 1.0 or gpu.fp8_flops is None:
        return gpu.fp16_flops
    if weight_bytes == FOUR_BIT_BYTES.get(gpu.architecture):
        return FP4_FLOPS.get(gpu.name, 2.0 * gpu.fp8_flops)
    return gpu.fp8_flops


@functools.cache
def shipped_efficiencies() -> Efficiencies:
    """Return the efficiencies that come with the package."""
    return from_json(resources.files("hetis.profiler").joinpath("efficiency.json").read_text(encoding="utf-8"))


def from_json(text: str) -> Efficiencies:
    """Read the text that ``tools.efficiency`` writes."""
    document = json.loads(text)
    if document["version"] != VERSION:
        raise ValueError(f"efficiency file is {document['version']!r}, this hetis reads {VERSION!r}")
    entries: Mapping[str, Mapping[str, Any]] = document["architectures"]
    ops = {
        name: {op: _op_from_dict(values) for op, values in entry.get("ops", {}).items()}
        for name, entry in entries.items()
    }
    measured = {name: Architecture(name=name, ops=ops[name]) for name, entry in entries.items() if "ops" in entry}
    return Efficiencies(
        memory=MemoryRule(**document["memory"]),
        links={name: _op_from_dict(op) for name, op in document["links"].items()},
        architectures={
            name: scaled_from(
                measured[entry["relative"]],
                name,
                factor=entry.get("compute_factor", 1.0),
                reason=entry["reason"],
                own=ops[name],
            )
            if "relative" in entry
            else measured[name]
            for name, entry in entries.items()
        },
    )


def scaled_from(
    relative: Architecture, name: str, *, factor: float, reason: str, own: Mapping[str, OpEfficiency] | None = None
) -> Architecture:  # fmt: skip
    """Return an architecture of which only ``own`` operators were measured.

    The others have the relative's coefficients, with ``factor`` times its share for FLOPs.
    """
    ops = {op_name: borrowed(op, factor=factor) for op_name, op in relative.ops.items()} | dict(own or {})
    return Architecture(name=name, ops=ops, relative=relative.name, compute_factor=factor, reason=reason)


def borrowed(op: OpEfficiency, *, factor: float = 1.0) -> OpEfficiency:
    """Return ``op`` for GPUs it was not measured on. Of its errors, only the one on unseen GPUs remains."""
    pieces = tuple(replace(piece, flop=float(f"{piece.flop * factor:.3g}")) for piece in op.pieces)
    return replace(op, pieces=pieces, measured_on=(), num_points=0, fitted_mape=None, held_out_mape=None)


def _op_from_dict(values: Mapping[str, Any]) -> OpEfficiency:
    pieces = tuple(RelativePiece(**piece) for piece in values["pieces"])
    return OpEfficiency(**{**values, "pieces": pieces, "measured_on": tuple(values.get("measured_on", ()))})
