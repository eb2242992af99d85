"""The attention workers of one rank, connected at the start, lost on the first failure, then joined again; and the
copies of head groups that move while their requests decode: a little with each step, the rest when the move commits.

The source owns the groups until the commit; until then every step keeps writing there. A move that cannot be finished
has no effect: the copies are dropped and the groups stay where they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.kv import DeviceError, DeviceLostError, KvShape, SequenceKey
from hetis.runtime.transport.keys import InvalidKeyError
from hetis.runtime.vllm.ranks.head_map import IntArray, RankHeadMap
from hetis.runtime.vllm.steps import LOCAL, GroupMove, MoveStep

_log = logging.getLogger(__name__)
AGAIN_S = 1.0  # interval between attempts to join a worker
_BASE = 128  # a base whose digits every dtype holds exactly

Join = Callable[[int], AttentionDevice]


class ConnectedWorkers:
    """Workers by their number among the devices, from 1 on; number 0 is the rank itself."""

    def __init__(
        self, names: Sequence[str], join: Join, *, epoch: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``join`` connects to the worker with a number; it may take its whole time-out, and raise DeviceError."""
        self.names, self.epoch = tuple(names), epoch
        self._join, self._clock = join, clock
        self._devices: dict[int, AttentionDevice] = {}
        self._joining: set[int] = set()
        self._again_s: dict[int, float] = {}
        self._logged: dict[int, str] = {}  # the last reason why a worker could not be joined, as logged
        self._came: SimpleQueue[tuple[int, AttentionDevice | Exception]] = SimpleQueue()
        for number in range(1, len(self.names) + 1):
            try:
                self._devices[number] = join(number)
            except DeviceError as error:
                _log.warning("attention worker %s is not there yet: %s", self._name(number), error)
                self._logged[number] = str(error)
                self._again_s[number] = clock() + AGAIN_S

    def get(self, number: int) -> AttentionDevice | None:
        """Return a worker, or None if it is lost or was never there."""
        return self._devices.get(number)

    @property
    def present(self) -> tuple[int, ...]:
        """The numbers of the workers that are there."""
        return tuple(sorted(self._devices))

    def number(self, name: str) -> int:
        """Return the number of a worker by its name."""
        return self.names.index(name) + 1

    def lose(self, number: int, error: Exception) -> bool:
        """Drop a worker that failed, and return whether it was there until now."""
        device = self._devices.pop(number, None)
        if device is None:
            return False
        _log.warning("attention worker %s is lost: %s", self._name(number), error)
        _close(device)
        self._again_s[number] = self._clock() + AGAIN_S
        return True

    def close(self) -> None:
        """Disconnect from all workers, which then drop what they hold."""
        for device in self._devices.values():
            _close(device)
        self._devices.clear()

    def advance(self) -> tuple[int, ...]:
        """Begin to join missing workers, between two steps, and return the numbers of those that are back."""
        back = []
        while not self._came.empty():
            number, came = self._came.get_nowait()
            self._joining.discard(number)
            if isinstance(came, Exception):
                self._again_s[number] = self._clock() + AGAIN_S
                self._log_once(number, came)
            else:
                _log.info("attention worker %s is back", self._name(number))
                self._devices[number] = came
                self._logged.pop(number, None)
                back.append(number)
        now_s = self._clock()
        for number, again_s in list(self._again_s.items()):
            if again_s <= now_s and number not in self._joining and number not in self._devices:
                del self._again_s[number]
                self._joining.add(number)
                name = f"join-{self._name(number)}"
                threading.Thread(target=self._try, args=(number,), name=name, daemon=True).start()
        return tuple(back)

    def _log_once(self, number: int, error: Exception) -> None:
        """Log why a worker is not back, once for every reason."""
        if self._logged.get(number) == str(error):
            return
        self._logged[number] = str(error)
        is_expected = isinstance(error, DeviceError | InvalidKeyError | OSError)
        _log.warning(
            "attention worker %s cannot be joined: %s",
            self._name(number),
            error,
            exc_info=None if is_expected else error,
        )

    def _name(self, number: int) -> str:
        return self.names[number - 1]

    def _try(self, number: int) -> None:
        try:
            self._came.put((number, self._join(number)))
        except Exception as error:  # retry, whatever the error is
            self._came.put((number, error))


def _close(device: AttentionDevice) -> None:
    close: Callable[[], None] | None = getattr(device, "close", None)
    if close is not None:
        close()


class BlockStore:
    """The KV of one rank: all layers of its stage."""

    def __init__(self, layers: Sequence[Any], block_tokens: int) -> None:
        """Initialise with vLLM's attention layers, in order, with their caches bound."""
        self._layers, self._block_tokens = tuple(layers), block_tokens
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, blocks: IntArray, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of K and V [layers, positions, d] at positions ``first`` to ``last - 1`` of one head group."""
        k_places, v_places = self._found_places()
        positions = np.arange(first, last)
        numbers = torch.from_numpy(blocks[positions // self._block_tokens])
        within = torch.from_numpy(positions % self._block_tokens)
        rows = [layer.kv_cache.flatten(1) for layer in self._layers]
        k, v = (
            torch.stack([row[numbers[:, None].to(row.device), places[within].to(row.device)] for row in rows])
            for places in (k_places, v_places)
        )
        return k, v

    def write(self, blocks: IntArray, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write K and V, each [layers, positions, d], to the positions from ``first`` on."""
        positions = np.arange(first, first + k.shape[1])
        slots = blocks[positions // self._block_tokens] * self._block_tokens + positions % self._block_tokens
        for number, layer in enumerate(self._layers):
            cache = layer.kv_cache
            keys, values = (x[number].unsqueeze(1).to(cache).contiguous() for x in (k, v))
            layer.impl.store(layer, keys, values, cache, torch.from_numpy(slots).to(cache.device))

    def _found_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the place of each number of K and V in a block, each [block tokens, d]."""
        if self._places is None:
            layer = self._layers[0]
            head_dim, size = layer.impl.head_size, self._block_tokens
            cache = torch.zeros_like(layer.kv_cache[:1])
            here = torch.arange(size * head_dim).view(size, 1, head_dim)
            slots = torch.arange(size, device=cache.device)
            digits = []
            for power in (1, _BASE, _BASE**2):
                k = ((here // power) % _BASE + 1).to(cache)  # 0 means no place
                layer.impl.store(layer, k.contiguous(), -k.contiguous(), cache, slots)
                digits.append(cache.flatten().float().round().long().cpu())
            value = sum((digit.abs() - 1) * _BASE**i for i, digit in enumerate(digits))
            k_places, v_places = (_inverse(value, chosen, size, head_dim) for chosen in (digits[0] > 0, digits[0] < 0))
            self._places = k_places, v_places
        return self._places


def _inverse(value: torch.Tensor | int, chosen: torch.Tensor, size: int, head_dim: int) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    places = torch.full((size * head_dim,), -1, dtype=torch.int64)
    at = torch.nonzero(chosen).flatten()
    places[value[at]] = at
    assert int(places.min()) >= 0, "the backend does not keep every number of a block"
    return places.view(size, head_dim)


@dataclass(slots=True)
class _Copy:
    """This rank's progress with a move in flight; ``copied`` positions are at the target."""

    move: GroupMove
    copied: int = 0
    is_reported: bool = False


class KvMigrator:
    """The moves of one rank."""

    def __init__(
        self, heads: RankHeadMap, workers: ConnectedWorkers, shape: KvShape, store: BlockStore, *, bytes_per_step: int
    ) -> None:
        """At most ``bytes_per_step`` of KV are copied between two steps, but at least one position of every group."""
        self._heads, self._workers, self._shape, self._store = heads, workers, shape, store
        self._bytes_per_step = bytes_per_step
        self._open: dict[int, _Copy] = {}
        self._copied: set[int] = set()
        self._failed: set[int] = set()

    @property
    def is_idle(self) -> bool:
        """Return whether no move is in flight."""
        return not self._open

    def take(self, step: MoveStep) -> None:
        """Begin, commit or abort a move. Raises DeviceError, after which the worker must be declared lost."""
        move = step.move
        if step.phase == "begin":
            ends = {move.source, move.target} - {LOCAL}
            if self._heads.row(move.anchor) is None or any(self._workers.get(end) is None for end in ends):
                self._failed.add(move.number)
            else:
                self._open[move.number] = _Copy(move)
            return
        one = self._open.pop(move.number, None)
        if step.phase == "commit":
            self._commit(move, one)
        elif one is not None:
            self._drop(move.target, move)

    def advance(self) -> None:
        """Copy as much as one step may. Raises as `take`."""
        left = self._bytes_per_step
        for one in list(self._open.values()):
            row = self._row(one.move)
            tokens = int(self._heads.tokens[row])
            left -= self._copy_some(one, tokens, left)
            if one.copied == tokens and not one.is_reported:
                one.is_reported = True
                self._copied.add(one.move.number)
            if left <= 0:
                break

    def rewind(self, rows: IntArray, firsts: IntArray) -> None:
        """Invalidate copies of positions from ``firsts`` on, shape [requests], because they are computed again.

        A request restarts if another rank lost a worker; what this rank stored with it may be useless.
        """
        for one in self._open.values():
            for first in firsts[rows == self._row(one.move)].tolist():
                one.copied = min(one.copied, first)

    def forget(self, anchor: int) -> None:
        """Void the moves of a request that left or is recomputed. Raises as `take`."""
        for number in [n for n, one in self._open.items() if one.move.anchor == anchor]:
            move = self._open.pop(number).move
            self._failed.add(number)
            self._drop(move.target, move)

    def lose(self, device: int) -> None:
        """Void the moves from and to a lost worker."""
        for number in [n for n, one in self._open.items() if device in (one.move.source, one.move.target)]:
            move = self._open.pop(number).move
            self._failed.add(number)
            if move.target != device and self._workers.get(move.target) is not None:
                self._drop(move.target, move)

    def take_results(self) -> tuple[set[int], set[int]]:
        """Return the moves whose copies are complete and those that failed, since the last call."""
        copied, failed = self._copied, self._failed
        self._copied, self._failed = set(), set()
        return copied, failed

    def _commit(self, move: GroupMove, one: _Copy | None) -> None:
        """Commit a move, as the scheduler decided. Without a whole copy the request is recomputed at its new homes.

        A move that relieves the pool is not copied yet: it is copied here, in pieces as large as those of other moves.
        """
        row = self._heads.row(move.anchor)
        if row is None:
            return
        try:
            if one is None:
                self._heads.must_restart[row] = True
            else:
                while one.copied < (tokens := int(self._heads.tokens[row])):
                    self._copy_some(one, tokens, self._bytes_per_step)
            self._drop(move.source, move)
        except DeviceError:
            self._heads.must_restart[row] = True
            raise
        except torch.OutOfMemoryError:
            _log.warning("no memory is left to copy KV, request with anchor %d is computed again", move.anchor)
            self._heads.must_restart[row] = True
        finally:
            self._heads.devices[row, list(move.groups)] = move.target

    def _copy_some(self, one: _Copy, tokens: int, most_bytes: int) -> int:
        """Copy at least one position of those before ``tokens``, if there are any; return the copied bytes."""
        position_bytes = len(one.move.groups) * self._shape.page_bytes // self._shape.page_tokens
        last = min(tokens, one.copied + max(most_bytes // position_bytes, 1))
        if last <= one.copied:
            return 0
        copied_bytes = (last - one.copied) * position_bytes
        self._copy(one, last)
        one.copied = last
        return copied_bytes

    def _copy(self, one: _Copy, last: int) -> None:
        move, first = one.move, one.copied
        row, groups = self._row(move), list(move.groups)
        number = int(self._heads.numbers[row])
        if move.source == LOCAL:
            pairs = [self._store.read(self._blocks(row, group), first, last) for group in groups]
            k, v = (torch.stack(side) for side in zip(*pairs, strict=True))
        else:
            k, v = self._device(move.source).export(number, 0, groups, first, last)
        if move.target == LOCAL:
            for i, group in enumerate(groups):
                self._store.write(self._blocks(row, group), first, k[i], v[i])
        else:
            self._device(move.target).adopt(number, 0, groups, first, k, v)

    def _drop(self, device: int, move: GroupMove) -> None:
        row = self._heads.row(move.anchor)
        there = self._workers.get(device)
        if there is not None and row is not None:
            there.drop([SequenceKey(int(self._heads.numbers[row]), 0, group) for group in move.groups])

    def _device(self, number: int) -> AttentionDevice:
        device = self._workers.get(number)
        if device is None:
            raise DeviceLostError(self._workers.names[number - 1], "it is gone")
        return device

    def _row(self, move: GroupMove) -> int:
        row = self._heads.row(move.anchor)
        assert row is not None, "moves of a request end with it"
        return row

    def _blocks(self, row: int, group: int) -> IntArray:
        blocks: IntArray = self._heads.tables[row, group].astype(np.int64)
        return blocks
