"""The kernels of attention are compiled through `kernel`; see `hetis.solver.compiled`."""

from __future__ import annotations

from pathlib import Path

from hetis.solver.compiled import kernel_of

# Sums may be reordered, so that they are done many at a time; infinities and NaN stay, so that a broken model shows.
kernel = kernel_of(Path(__file__).parent, fastmath={"reassoc", "contract", "arcp", "nsz"})
