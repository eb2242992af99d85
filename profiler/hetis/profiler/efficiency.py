"""The file format of calibrated efficiencies: coefficients relative to a GPU's peaks, with error and origin.

The roofline of a GPU is these coefficients times its peaks (`roofline.py`). ``tools/efficiency.py`` writes the file,
which is package data (``efficiency.json``). Nothing here needs numpy, so reading it costs next to nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from hetis.solver.profile import Piece

VERSION = "hetis-efficiency/v1"


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
    held_out_mape: float | None = None  # on shapes the fit never saw; for links: on hosts it never saw
    transfer_mape: float | None = None  # on GPUs the fit never saw: each measured GPU by the fits of the others
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


@functools.cache
def shipped() -> Efficiencies:
    """Return the efficiencies that come with the package."""
    return from_json(resources.files("hetis.profiler").joinpath("efficiency.json").read_text(encoding="utf-8"))


def to_json(efficiencies: Efficiencies) -> str:
    """Return the text of the file."""
    document = {
        "version": VERSION,
        "made_by": "python -m tools.efficiency",
        "memory": {
            "usable_ratio": efficiencies.memory.usable_ratio,
            "reserve_bytes": efficiencies.memory.reserve_bytes,
            "reason": efficiencies.memory.reason,
        },
        "links": {name: _op_to_dict(op) for name, op in efficiencies.links.items()},
        "architectures": {name: _architecture_to_dict(arch) for name, arch in efficiencies.architectures.items()},
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> Efficiencies:
    """Read the text that `to_json` writes."""
    document = json.loads(text)
    if document["version"] != VERSION:
        raise ValueError(f"efficiency file is {document['version']!r}, this hetis reads {VERSION!r}")
    entries: Mapping[str, Mapping[str, Any]] = document["architectures"]
    measured = {
        name: Architecture(name=name, ops={op: _op_from_dict(fields) for op, fields in entry["ops"].items()})
        for name, entry in entries.items()
        if "relative" not in entry
    }
    return Efficiencies(
        memory=MemoryRule(**document["memory"]),
        links={name: _op_from_dict(op) for name, op in document["links"].items()},
        architectures={name: measured.get(name) or _relative(name, entry, measured) for name, entry in entries.items()},
    )


def _relative(name: str, entry: Mapping[str, Any], measured: Mapping[str, Architecture]) -> Architecture:
    own = {op: _op_from_dict(fields) for op, fields in entry.get("ops", {}).items()}
    relative, factor = measured[entry["relative"]], entry.get("compute_factor", 1.0)
    return scaled_from(relative, name, factor=factor, reason=entry["reason"], own=own)


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


def _architecture_to_dict(arch: Architecture) -> dict[str, Any]:
    if arch.relative is None:
        return {"ops": {name: _op_to_dict(op) for name, op in arch.ops.items()}}
    own = {name: _op_to_dict(op) for name, op in arch.ops.items() if op.measured_on}
    entry = {"relative": arch.relative, "compute_factor": arch.compute_factor, "reason": arch.reason}
    return entry | ({"ops": own} if own else {})


def _op_to_dict(op: OpEfficiency) -> dict[str, Any]:
    """Return only the fields that are set, and of pieces the coefficients that are not zero."""
    fields: dict[str, Any] = {"pieces": [_set_fields(piece) for piece in op.pieces]}
    fields.update((name, value) for name, value in _set_fields(op).items() if name != "pieces")
    return fields


def _set_fields(value: RelativePiece | OpEfficiency) -> dict[str, Any]:
    pairs = ((name, getattr(value, name)) for name in type(value).__dataclass_fields__)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in pairs if v not in (0, (), "", None)}


def _op_from_dict(fields: Mapping[str, Any]) -> OpEfficiency:
    known = dict(fields)
    pieces = tuple(RelativePiece(**piece) for piece in known.pop("pieces"))
    return OpEfficiency(pieces=pieces, measured_on=tuple(known.pop("measured_on", ())), **known)
