"""Compilation of placement's kernels through `kernel`; see `hetis.solver.compiled`."""

from __future__ import annotations

from pathlib import Path

from hetis.solver.compiled import kernel_of

kernel = kernel_of(Path(__file__).parent)
