"""The text of efficiency.json, which `hetis.profiler.roofline.from_json` reads."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from hetis.profiler.roofline import VERSION, Architecture, Efficiencies, OpEfficiency, RelativePiece


def to_json(efficiencies: Efficiencies) -> str:
    """Return the text of the file."""
    document = {
        "version": VERSION,
        "made_by": "python -m tools.efficiency",
        "memory": asdict(efficiencies.memory),
        "links": {name: _op_to_dict(op) for name, op in efficiencies.links.items()},
        "architectures": {name: _architecture_to_dict(arch) for name, arch in efficiencies.architectures.items()},
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _architecture_to_dict(arch: Architecture) -> dict[str, Any]:
    if arch.relative is None:
        return {"ops": {name: _op_to_dict(op) for name, op in arch.ops.items()}}
    own = {name: _op_to_dict(op) for name, op in arch.ops.items() if op.measured_on}
    entry = {"relative": arch.relative, "compute_factor": arch.compute_factor, "reason": arch.reason}
    return entry | ({"ops": own} if own else {})


def _op_to_dict(op: OpEfficiency) -> dict[str, Any]:
    return _set_fields(op) | {"pieces": [_set_fields(piece) for piece in op.pieces]}


def _set_fields(value: RelativePiece | OpEfficiency) -> dict[str, Any]:
    """Return only the fields that are set, of pieces the coefficients that are not zero."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: one for name, one in found.items() if one not in (0, (), "", None)}
