"""Abbreviated device names: ``l4-0/0, l4-0/1, l4-1/0, l4-1/1`` is ``l4-[0-1]/[0-1]``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBERED = re.compile(r"^(?P<stem>.*-)(?P<number>\d+)$")


def abbreviate(devices: Sequence[str]) -> str:
    """Return the devices as a compact host list; their order is not kept."""
    nodes: dict[str, list[int]] = {}
    for device in devices:
        node, _, index = device.rpartition("/")
        nodes.setdefault(node, []).append(int(index))
    same_indices: dict[tuple[str, str], list[int]] = {}
    for node, indices in nodes.items():
        match = _NUMBERED.match(node)
        numbers = same_indices.setdefault((match["stem"] if match else node, number_ranges(indices)), [])
        if match:
            numbers.append(int(match["number"]))
    return " ".join(
        f"{stem}{number_ranges(numbers) if numbers else ''}/{indices}"
        for (stem, indices), numbers in same_indices.items()
    )


def number_ranges(numbers: Iterable[int]) -> str:
    """Return ``3`` or ``[0-2,5]``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if text.isdigit() else f"[{text}]"
