"""The pages of one device and the virtual sequences that hold them.

A page belongs to one (request, KV head) and spans all layers of the stage, so one table per virtual sequence serves
all layers: K and V are ``[layers, pages, page_tokens, head_dim]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from hetis.runtime.kv.errors import OutOfPagesError, UnknownSequenceError
from hetis.runtime.kv.shape import KvShape, SequenceKey

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Sequence:
    """One virtual sequence: its row in the table, its pages, and the number of positions written."""

    row: int
    pages: list[int] = field(default_factory=list)
    tokens: int = 0


class PagePool:
    """Pages, tables and the memory behind them. Not thread-safe.

    Attributes:
        k: shape [layers, pages, page_tokens, head_dim].
        v: the same.
        table: page numbers of every sequence, int32, shape [rows, most pages]; `rows` returns a sequence's row.
    """

    def __init__(self, name: str, shape: KvShape, num_pages: int, device: str = "cpu") -> None:
        self.name, self.shape, self.num_pages = name, shape, num_pages
        size = (shape.layers, num_pages, shape.page_tokens, shape.head_dim)
        # Zeros instead of uninitialised memory: a page's unused slots are masked, but a NaN times a weight of 0 stays
        # NaN.
        self.k = torch.zeros(size, dtype=shape.torch_dtype, device=device)
        self.v = torch.zeros(size, dtype=shape.torch_dtype, device=device)
        self.table = np.zeros((16, 16), np.int32)
        self._free = list(range(num_pages - 1, -1, -1))
        self._free_rows = list(range(len(self.table) - 1, -1, -1))
        self._held: dict[SequenceKey, _Sequence] = {}

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def __len__(self) -> int:
        """Return the number of virtual sequences held."""
        return len(self._held)

    def __contains__(self, key: SequenceKey) -> bool:
        return key in self._held

    @property
    def sequences(self) -> tuple[SequenceKey, ...]:
        """The sequences held, in order of arrival."""
        return tuple(self._held)

    def tokens(self, key: SequenceKey) -> int:
        """Return the number of positions written so far."""
        return self._find(key).tokens

    def rows(self, keys: Sequence[SequenceKey]) -> IntArray:
        """Return the rows of these sequences in `table`, shape [keys]."""
        return np.fromiter((self._find(key).row for key in keys), np.int64, len(keys))

    def extend(self, keys: Sequence[SequenceKey], first: Sequence[int], last: Sequence[int]) -> None:
        """Make room for positions ``first[i]`` to ``last[i] - 1`` of every key, and count them as written.

        Raises:
            OutOfPagesError, UnknownSequenceError: nothing has changed.
        """
        held = self._held
        needed = 0
        for key, begin, end in zip(keys, first, last, strict=True):
            there = held.get(key)
            if begin > (there.tokens if there else 0):
                so_far = f"{there.tokens} positions" if there else "nothing"
                raise UnknownSequenceError(
                    self.name, f"{key} holds {so_far}, {begin} come before what is to be written"
                )
            needed += max(self.shape.pages(end) - (len(there.pages) if there else 0), 0)
        if needed > len(self._free):
            raise OutOfPagesError(self.name, needed=needed, free=len(self._free))
        for key, end in zip(keys, last, strict=True):
            there = held.get(key)
            if there is None:
                there = held[key] = _Sequence(self._take_row())
            missing = self.shape.pages(end) - len(there.pages)
            if missing > 0:
                self._add_pages(there, missing)
            there.tokens = max(there.tokens, end)

    def drop(self, keys: Sequence[SequenceKey]) -> None:
        """Free what these sequences hold. Unknown sequences are ignored."""
        for key in keys:
            there = self._held.pop(key, None)
            if there is not None:
                self._free.extend(reversed(there.pages))
                self._free_rows.append(there.row)

    def read(self, key: SequenceKey, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of K and V at positions ``first`` to ``last - 1``, each [layers, positions, d]."""
        there = self._find(key)
        if last > there.tokens:
            raise UnknownSequenceError(self.name, f"{key} holds {there.tokens} positions, {last} were asked for")
        slots = self.slots(there.row, np.arange(first, last))
        return self.k.flatten(1, 2)[:, slots], self.v.flatten(1, 2)[:, slots]

    def write(self, key: SequenceKey, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write K and V, each [layers, positions, d], to the positions from ``first`` on, which `extend` provided."""
        slots = self.slots(self._find(key).row, np.arange(first, first + k.shape[1]))
        self.k.flatten(1, 2)[:, slots] = k.to(self.k)
        self.v.flatten(1, 2)[:, slots] = v.to(self.v)

    def slots(self, rows: IntArray | int, positions: IntArray) -> torch.Tensor:
        """Return the indices, on the device, of ``positions`` of the table's ``rows`` among the slots of all pages."""
        size = self.shape.page_tokens
        slots = self.table[rows, positions // size].astype(np.int64) * size + positions % size
        return torch.from_numpy(slots).to(self.k.device)

    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write K and V of one layer, each [N, d], to N ``slots``."""
        self.k[layer].flatten(0, 1)[slots] = k
        self.v[layer].flatten(0, 1)[slots] = v

    def check_invariants(self) -> None:
        """Check that every page is free or belongs to one sequence. A failure is a bug of this class."""
        used = [page for there in self._held.values() for page in there.pages]
        assert sorted(used + self._free) == list(range(self.num_pages)), "pages were lost or are used twice"
        rows = [there.row for there in self._held.values()]
        assert sorted(rows + self._free_rows) == list(range(len(self.table))), "rows were lost or are used twice"
        for key, there in self._held.items():
            assert self.table[there.row, : len(there.pages)].tolist() == there.pages, f"the table of {key} is wrong"
            assert there.tokens <= len(there.pages) * self.shape.page_tokens, f"{key} has too few pages"

    # --- inside

    def _find(self, key: SequenceKey) -> _Sequence:
        there = self._held.get(key)
        if there is None:
            raise UnknownSequenceError(self.name, f"{key} is not here")
        return there

    def _take_row(self) -> int:
        if not self._free_rows:
            rows = len(self.table)
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
            self._free_rows = list(range(2 * rows - 1, rows - 1, -1))
        return self._free_rows.pop()

    def _add_pages(self, there: _Sequence, missing: int) -> None:
        begin = len(there.pages)
        there.pages += [self._free.pop() for _ in range(missing)]
        while len(there.pages) > self.table.shape[1]:
            self.table = np.concatenate([self.table, np.zeros_like(self.table)], axis=1)
        self.table[there.row, begin : len(there.pages)] = there.pages[begin:]
