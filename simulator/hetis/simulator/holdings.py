"""KV blocks held by the requests of a replica: promised to a prompt, filled by chunks, added by growth, released."""

from __future__ import annotations

from hetis.simulator.growth import KvGrowth
from hetis.simulator.micro_batch import MicroBatch
from hetis.simulator.request_log import RequestLog


class Holdings:
    """Takes and frees blocks on all copies that a micro-batch runs on, or on none.

    Copies without a pool count blocks of whole requests (`KvRoom`); those with a pool use dispatch (`PoolCopy`), which
    takes the blocks of a prompt at once, and count them too if the engine's number of blocks is set.
    """

    def __init__(self, log: RequestLog, growth: KvGrowth) -> None:
        self._log, self._growth = log, growth

    def promise(self, batch: MicroBatch, request: int, spare: int) -> bool:
        """Reserve blocks for a prompt; ``spare`` stay free on every copy that holds anything. False: no room."""
        target = self._log.target[request]
        blocks = self._growth.blocks(target)
        for room in batch.rooms:
            if not room.admits(blocks, spare):
                return False
        for number, (pool, load) in enumerate(batch.pools):
            if not pool.place(load, request, self._growth.cached(target)):
                for other, _ in batch.pools[:number]:
                    other.remove(request)
                return False
        for room in batch.rooms:
            room.promised += blocks
        return True

    def fill(self, batch: MicroBatch, filled: int, tokens: int) -> bool:
        """Take promised blocks for ``tokens`` more of a prompt; False: growth of other requests has used them."""
        blocks = self._growth.blocks(filled + tokens) - self._growth.blocks(filled)
        if not blocks:
            return True
        for room in batch.rooms:
            if room.used + blocks > room.total:
                return False
        for room in batch.rooms:
            room.used += blocks
            room.promised -= blocks
        return True

    def grow(self, batch: MicroBatch, blocks: int) -> bool:
        """Take this number of blocks for requests that decode; False: some copy has too few."""
        for room in batch.rooms:
            if room.used + blocks > room.total:
                return False
        for room in batch.rooms:
            room.used += blocks
        return True

    def release(self, batch: MicroBatch, request: int, context: int, *, extra_blocks: int = 0) -> None:
        """Free the blocks of a request with ``context`` tokens, and those still promised to its prompt."""
        growth, target = self._growth, self._log.target[request]
        blocks = growth.blocks(context) + extra_blocks
        promised = growth.blocks(target) - growth.blocks(context) if context < target else 0
        for room in batch.rooms:
            room.used -= blocks
            room.promised -= promised
        for pool, _ in batch.pools:
            pool.remove(request)
