"""The kernels of re-dispatch are compiled through `kernel`; see `hetis.solver.compiled`.

They call no kernel of another package: cached code is dated by the source files of its own.
"""

from __future__ import annotations

from pathlib import Path

from hetis.solver.compiled import kernel_of

kernel = kernel_of(Path(__file__).parent)
