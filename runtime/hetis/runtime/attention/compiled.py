"""The decorator that compiles the attention kernels; see `hetis.solver.compiled`."""

from __future__ import annotations

from pathlib import Path

from hetis.solver.compiled import kernel_of

# Sums may be reordered, so that they vectorise. Infinities and NaN are kept, so that a broken model shows.
kernel = kernel_of(Path(__file__).parent, fastmath={"reassoc", "contract", "arcp", "nsz"})
