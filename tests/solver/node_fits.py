"""Whether groups of devices fit the nodes of a tiny fleet, each inside one node."""

from __future__ import annotations

from collections.abc import Mapping

from tests.solver.device_classes import DeviceClass

Need = tuple[tuple[int, ...], ...]  # per class: sizes of the device groups, in descending order


def combine(a: Need, b: Need) -> Need:
    return tuple(tuple(sorted((*x, *y), reverse=True)) for x, y in zip(a, b, strict=True))


def fits_nodes(need: Need, nodes: Mapping[DeviceClass, int]) -> bool:
    """Return whether all device groups fit, each inside one node."""
    return all(
        fits_bins(sizes, (device_class.per_node,) * count)
        for sizes, (device_class, count) in zip(need, nodes.items(), strict=True)
    )


def fits_bins(sizes: tuple[int, ...], room: tuple[int, ...]) -> bool:
    if sum(sizes) > sum(room):
        return False
    if not sizes:
        return True
    return any(
        fits_bins(sizes[1:], tuple(sorted((*room[:i], room[i] - sizes[0], *room[i + 1 :]))))
        for i in range(len(room))
        if room[i] >= sizes[0] and room[i] not in room[:i]
    )
