"""Matches a table's GPU names to the catalogue."""

from __future__ import annotations

from functools import cache

from hetis.formats import catalogue
from hetis.profiler.importers.reading import Rows

# Names that the catalogue refuses because they are ambiguous; the READMEs of the tables resolve them.
_MEANT = {
    "A100": "A100-SXM-80GB",
    "H100": "H100-SXM-80GB",
    "L40S-48GB": "L40S",
    "a100-80gb": "A100-SXM-80GB",
    "h100-80gb": "H100-SXM-80GB",
    "h100-80gb-pcap": "H100-SXM-80GB",
    "a100_sxm": "A100-SXM-80GB",
    "h100_sxm": "H100-SXM-80GB",
    "l40s": "L40S",
    "a100_pcie": "A100-PCIe-80GB",
}


def gpu_name(rows: Rows, index: int, column: str) -> str | None:
    """Return the catalogue's name, or None after noting the problem."""
    text = rows.text(index, column)
    found = catalogue_name(text)
    if found is None:
        several = _could_be(text)
        meant = f"which could be {' or '.join(several)}" if several else "no GPU of the catalogue"
        rows.refuse(index, column, f"is {text!r}, {meant}")
    return found


@cache
def _could_be(text: str) -> tuple[str, ...]:
    """Return the GPUs that an ambiguous name may mean, or none if the name is unknown."""
    try:
        catalogue.find_gpu(text)
    except catalogue.UnknownNameError as error:
        return error.candidates if error.ambiguous else ()
    return ()


@cache
def catalogue_name(text: str) -> str | None:
    """Return the catalogue's name of a GPU as tables call it, or None if it is ambiguous or unknown."""
    try:
        return catalogue.find_gpu(_MEANT.get(text, text)).gpu.name
    except catalogue.UnknownNameError:
        return None
