"""Compilation of re-dispatch's kernels through `kernel`; see `hetis.solver.compiled`.

They call kernels of dispatch, so their cached code is dated by the source files of both.
"""

from __future__ import annotations

from pathlib import Path

from hetis.solver.compiled import kernel_of

_HERE = Path(__file__).parent
kernel = kernel_of(_HERE, _HERE.parent / "dispatch")
