"""Compilation of the published heuristics' kernels through `kernel`; see `hetis.solver.compiled`."""

from __future__ import annotations

from pathlib import Path

from hetis.solver.compiled import kernel_of
from hetis.solver.placement import compiled as placement

kernel = kernel_of(Path(__file__).parent, Path(placement.__file__).parent)
