"""KV memory of one device: the shape of virtual sequences, the pages that they hold, errors, and free memory.

A page belongs to one (request, KV head) and spans all layers of the stage, so one table per virtual sequence serves
all layers: K and V are ``[layers, pages, page_tokens, head_dim]``.

HetisError
+-- DeviceError
    +-- DeviceLostError         it no longer answers; what it held is gone
        +-- UnreachedDeviceError   no connection to it could be made
    +-- OutOfPagesError         it has too few free pages
    +-- UnknownSequenceError    it does not hold the requested sequence
    +-- StaleEpochError         another engine has taken over
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hetis.solver.errors import HetisError

_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype({"bfloat16": "uint16"}.get(name, name)) for name in ("float32", "float64", "bfloat16", "float16")
}
IntArray = npt.NDArray[np.int64]
Array = npt.NDArray[Any]  # an array as a channel receives it: numpy has no bfloat16, so it has its words
_MEMINFO = Path("/proc/meminfo")
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


class DeviceError(HetisError):
    """A device could not do what was requested. ``device`` is its name."""

    def __init__(self, device: str, message: str) -> None:
        super().__init__(f"{device}: {message}")
        self.device = device


class DeviceLostError(DeviceError):
    """The device no longer answers: requests with heads there have to be prefilled again."""


class UnreachedDeviceError(DeviceLostError):
    """There is no connection to the device. It may not know of the attempt, so only this side can try again."""


class OutOfPagesError(DeviceError):
    """The device needs ``needed`` pages and has ``free``."""

    def __init__(self, device: str, *, needed: int, free: int) -> None:
        super().__init__(device, f"{needed} KV pages are needed, {free} are free")
        self.needed, self.free = needed, free


class UnknownSequenceError(DeviceError):
    """The device does not hold the sequence, or not up to the requested position: a bug of the caller."""


class StaleEpochError(DeviceError):
    """The device follows an engine of a later epoch."""

    def __init__(self, device: str, *, epoch: int, current: int) -> None:
        super().__init__(device, f"epoch {epoch} has ended, {current} is current")
        self.epoch, self.current = epoch, current


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """The common shape of one stage's virtual sequences. A device is made for one shape."""

    layers: int  # number of layers of the stage
    head_dim: int  # d, the numbers per head
    queries_per_group: int  # r, the query heads that share a KV head
    page_tokens: int  # token slots of a page, which belongs to one virtual sequence and spans all layers
    dtype: str  # dtype of K, V, queries and outputs: float32, float64, bfloat16 or float16
    scale: float  # factor of the scores before the softmax
    # For each layer, the number of positions that attention reaches back, including the query's own; 0: all
    windows: tuple[int, ...]
    soft_cap: float = 0.0  # cap of the scaled scores, ``cap * tanh(score / cap)``, as in Gemma 2; 0: none

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy type; for bfloat16, which numpy lacks, the type of its words."""
        return _NUMPY_DTYPES[self.dtype]

    @property
    def item_bytes(self) -> int:
        """The bytes of one number."""
        return _NUMPY_DTYPES[self.dtype].itemsize

    @property
    def page_bytes(self) -> int:
        """The bytes of K and V of one page, all layers."""
        return 2 * self.layers * self.page_tokens * self.head_dim * self.item_bytes

    def pages(self, tokens: int) -> int:
        """Return the number of pages that a virtual sequence with this many positions takes."""
        return -(-tokens // self.page_tokens)


class SequenceKey(NamedTuple):
    """The key of a virtual sequence. ``incarnation`` counts how often its request lost its KV: older ones are void."""

    request: int
    incarnation: int
    head: int


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
            raise UnknownSequenceError(self.name, f"{key} holds {there.tokens} positions, {last} were requested")
        slots = self.slots(there.row, np.arange(first, last))
        return self.k.flatten(1, 2)[:, slots], self.v.flatten(1, 2)[:, slots]

    def write(self, key: SequenceKey, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write K and V, each [layers, positions, d], to the positions from ``first`` on, which `extend` provided."""
        slots = self.slots(self._find(key).row, np.arange(first, first + k.shape[1]))
        self.k.flatten(1, 2)[:, slots] = k.to(self.k)
        self.v.flatten(1, 2)[:, slots] = v.to(self.v)

    def slots(self, rows: IntArray | int, positions: IntArray) -> torch.Tensor:
        """Return the indices, on the device, of ``positions`` of the table's ``rows`` among the slots of all pages."""
        return torch.from_numpy(self.slot_numbers(rows, positions)).to(self.k.device)

    def slot_numbers(self, rows: IntArray | int, positions: IntArray) -> IntArray:
        """Like `slots`, as an array."""
        size = self.shape.page_tokens
        slots: IntArray = self.table[rows, positions // size].astype(np.int64) * size + positions % size
        return slots

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


def free_memory_bytes(device: str = "cpu") -> int:
    """Return the bytes that a torch device can still provide.

    For a CPU these can be allocated without swapping, on the machine or within the container's limit. For a GPU they
    include memory that torch has reserved but does not use now.
    """
    if device != "cpu":
        return _free_of_gpu(device)
    free = _available()
    for limit, used in _LIMITS:
        try:
            most, now = limit.read_text().strip(), int(used.read_text())
        except (OSError, ValueError):
            continue
        if most.isdigit():
            free = min(free, max(int(most) - now, 0))
    return free


def _free_of_gpu(device: str) -> int:
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _available() -> int:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def cuda_count() -> int:
    """Return the number of GPUs that torch finds among those in CUDA_VISIBLE_DEVICES."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def use_cuda_device(device: str) -> bool:
    """Make ``cuda`` or ``cuda:N`` the current device of this process, on which Triton launches, wherever pages are.

    Return whether the device exists.
    """
    number = int(device.partition(":")[2] or 0)
    if number >= cuda_count():
        return False
    torch.cuda.set_device(number)
    return True
