"""Head maps in pieces small enough not to delay other messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hetis.v1.head_map_pb2 import HeadMap

MOST_BYTES = (1 << 20) - 4096  # per piece of head maps; the message around it fits in the rest of 1 MiB


def pieces_of(head_maps: Iterable[HeadMap], *, most_bytes: int = MOST_BYTES) -> Iterator[list[HeadMap]]:
    """Yield lists of head maps of at most ``most_bytes`` bytes. A larger map is split by its requests.

    Yields at least one list, possibly empty. Each part of a map repeats its devices; the moves are in the first part.
    """
    piece: list[HeadMap] = []
    size = 0
    for head_map in head_maps:
        for part in _parts_of(head_map, most_bytes):
            part_size = part.ByteSize() + 8
            if piece and size + part_size > most_bytes:
                yield piece
                piece, size = [], 0
            piece.append(part)
            size += part_size
    yield piece


def _parts_of(head_map: HeadMap, most_bytes: int) -> Iterator[HeadMap]:
    if head_map.ByteSize() + 8 <= most_bytes:
        yield head_map
        return
    part = HeadMap(stage=head_map.stage, copy=head_map.copy, devices=head_map.devices)
    base = part.ByteSize()
    size, is_empty = base, True
    for field in ("moves", "requests"):
        for entry in getattr(head_map, field):
            entry_size = entry.ByteSize() + 8
            if not is_empty and size + entry_size > most_bytes:
                yield part
                part = HeadMap(stage=head_map.stage, copy=head_map.copy, devices=head_map.devices)
                size = base
            getattr(part, field).append(entry)
            size, is_empty = size + entry_size, False
    yield part
