"""The catalogue's GPU type for a product, found by the driver's name for it and its memory."""

from __future__ import annotations

import re

from hetis.formats.catalogue import GpuEntry, UnknownNameError, find_gpu

# Drivers report less than the nominal memory: ECC on GDDR takes a sixteenth, firmware some hundred MiB. Boards that
# share a name differ by a quarter or more (A100 40 and 80 GB, V100 16 and 32 GB).
LEAST_MEMORY_SHARE = 0.88
MOST_MEMORY_SHARE = 1.06
# Words that drivers add but that distinguish no two boards: `RTX PRO 6000 Blackwell Server Edition`, `B300 SXM6 AC`.
_DECORATION = re.compile(r"\b(blackwell|edition|superchip|ac|dgx display)\b", re.IGNORECASE)


def gpu_entry(product_name: str, memory_bytes: int) -> GpuEntry | None:
    """Return the catalogue's entry for a product, or None if no entry matches both name and memory.

    Args:
        product_name: as the driver reports it, such as ``NVIDIA H100 80GB HBM3``.
        memory_bytes: as the driver reports it. 0: unknown, so the name alone decides.
    """
    for name in (product_name, _DECORATION.sub(" ", product_name)):
        try:
            found = [find_gpu(name)]
        except UnknownNameError as error:
            found = [find_gpu(candidate) for candidate in error.candidates] if _is_ambiguous(error) else []
        fitting = [entry for entry in found if _fits(entry, memory_bytes)]
        # `NVIDIA H200` is the SXM board: for the others the driver's name includes PCIe or NVL.
        of_the_name = fitting if len(fitting) == 1 else [entry for entry in fitting if "-SXM" in entry.gpu.name]
        if len(of_the_name) == 1:
            return of_the_name[0]
    return None


def _is_ambiguous(error: UnknownNameError) -> bool:
    return len(error.candidates) > 1  # a single candidate is a guess, not a match


def _fits(entry: GpuEntry, memory_bytes: int) -> bool:
    share = memory_bytes / entry.gpu.memory_bytes
    return not memory_bytes or LEAST_MEMORY_SHARE <= share <= MOST_MEMORY_SHARE
