"""The head map of one rank: where each head group of every running request lives, and in which blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hetis.runtime.vllm.batch import IntArray, Table
from hetis.runtime.vllm.steps import LOCAL, Admitted, Gone, Grown, Rehomed


class HeadMap:
    """Rows of requests, found by their anchors. Kept up to date by the events of `StepPlan`.

    Attributes:
        devices: device of each head group, shape [rows, G].
        tables: blocks of each local head group, shape [rows, G, width].
        numbers: of the requests, as workers know them, shape [rows].
        tokens: stored for each request, shape [rows].
        must_restart: requests that lost KV: void until they are recomputed from their first token, shape [rows].
        row_of: row of each anchor, -1 if there is none, shape [blocks].
    """

    def __init__(self, head_groups: int, num_blocks: int, *, rows: int = 16, width: int = 16) -> None:
        self.devices = np.zeros((rows, head_groups), np.int64)
        self.tables: Table = np.zeros((rows, head_groups, width), np.int32)
        self.numbers = np.zeros(rows, np.int64)
        self.tokens = np.zeros(rows, np.int64)
        self.must_restart = np.zeros(rows, np.bool_)
        self.anchors = np.full(rows, -1, np.int64)
        self.row_of = np.full(num_blocks, -1, np.int64)
        self._free = list(range(rows - 1, -1, -1))

    def admit(self, event: Admitted) -> None:
        if not self._free:
            self._add_rows()
        row = self._free.pop()
        self.row_of[event.anchor], self.anchors[row] = row, event.anchor
        self.devices[row], self.numbers[row] = event.devices, event.number
        self.must_restart[row], self.tokens[row] = False, 0

    def remove(self, event: Gone) -> int:
        """Remove a request and return its number."""
        row = self._row(event.anchor)
        self.row_of[event.anchor] = self.anchors[row] = -1
        self._free.append(row)
        return int(self.numbers[row])

    def grow(self, event: Grown) -> None:
        row, last = self._row(event.anchor), event.first + len(event.blocks)
        while last > self.tables.shape[2]:
            self.tables = np.concatenate([self.tables, np.zeros_like(self.tables)], axis=2)
        self.tables[row, event.group, event.first : last] = event.blocks

    def rehome(self, event: Rehomed) -> None:
        row = self._row(event.anchor)
        self.devices[row], self.tokens[row], self.must_restart[row] = event.devices, 0, True

    def row(self, anchor: int) -> int | None:
        """Return the row of an anchor, or None if the request is gone."""
        row = int(self.row_of[anchor])
        return None if row < 0 else row

    def with_groups_on(self, device: int) -> IntArray:
        """Return the rows of the requests that have head groups on a device."""
        running = np.flatnonzero(self.anchors >= 0)
        rows: IntArray = running[(self.devices[running] == device).any(axis=1)]
        return rows

    def keys_on(self, row: int, device: int) -> Iterator[tuple[int, int]]:
        """Yield the request's number and the head group for each group of a row that lives on a device."""
        for group in np.flatnonzero(self.devices[row] == device):
            yield int(self.numbers[row]), int(group)

    def remote_devices(self, row: int) -> set[int]:
        """Return the workers that hold groups of a row."""
        return set(self.devices[row].tolist()) - {LOCAL}

    # --- inside

    def _row(self, anchor: int) -> int:
        row = int(self.row_of[anchor])
        assert row >= 0, f"no request has anchor {anchor}"
        return row

    def _add_rows(self) -> None:
        rows = len(self.numbers)
        for name in ("devices", "tables", "numbers", "tokens", "must_restart", "anchors"):
            old = getattr(self, name)
            new = np.zeros_like(old) if name != "anchors" else np.full_like(old, -1)
            setattr(self, name, np.concatenate([old, new]))
        self._free = list(range(2 * rows - 1, rows - 1, -1))
