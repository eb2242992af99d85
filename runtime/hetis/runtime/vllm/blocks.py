"""vLLM's manager of KV blocks, for requests whose head groups have a block table each, or live elsewhere.

vLLM sees one block per request, its anchor, which never holds KV, because block tables of vLLM only grow, while those
of moving head groups do not. All real tables are here, and reach the ranks as events with the next step. All blocks
come from vLLM's one pool, so its watermarks, preemption and KV usage apply unchanged.

Prefix cache: full blocks are cached under vLLM's hashes with the head group's number as the group's. A request hits as
far as all of its groups do; it then begins with all groups here. vLLM offers blocks when it schedules the step that
fills them. Here they are offered only afterwards: until a step is sent, a group may still move, and then this step
fills blocks elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from hetis.runtime.vllm.steps import LOCAL, Event, Gone, Grown

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
    from vllm.v1.request import Request

    from hetis.runtime.vllm.allocator import HeadAllocator


@dataclass(frozen=True, kw_only=True)
class HeadGroupSpec(FullAttentionSpec):  # type: ignore[misc]
    """KV of *one* head group in one layer: ``num_kv_heads`` is 1, and a request takes blocks for each of its groups.

    All layers of a model share this spec, including those with sliding windows: windows are masked, and their blocks
    are not freed.
    """

    head_groups: int  # G, KV heads of the layer on each tensor parallel rank

    @classmethod
    def of(cls, spec: AttentionSpec) -> HeadGroupSpec:
        """Return the head group spec of the same layer."""
        if isinstance(spec, cls):
            return spec
        return cls(
            block_size=spec.block_size,
            num_kv_heads=1,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            head_groups=spec.num_kv_heads,
        )

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Return the bytes of a request of maximum length: the blocks of all groups, and its anchor."""
        blocks = cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.head_groups + 1
        return int(blocks * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list[HeadGroupSpec]) -> HeadGroupSpec:
        """Return the spec that all layers of a group share. Raises AssertionError if they differ."""
        assert all(spec == specs[0] for spec in specs[1:]), "layers of different head groups share no KV cache group"
        return copy.deepcopy(specs[0])


class HeadGroupManager(SingleTypeKVCacheManager):  # type: ignore[misc]
    """Block tables of every head group of every request."""

    homes: HeadAllocator  # set by the connector before the first request
    # Also set by the connector; called with the number of blocks that the pool lacks for a running request, that
    # request, and the tokens that it grows to
    relieve: Callable[[int, str, int], None] | None = None

    def __init__(self, kv_cache_spec: HeadGroupSpec, **arguments: Any) -> None:
        super().__init__(kv_cache_spec, **arguments)
        self.head_groups = kv_cache_spec.head_groups
        self.events: list[Event] = []  # events not yet sent to the ranks
        self._tables: dict[str, list[list[KVCacheBlock]]] = {}
        self._covered: dict[str, int] = {}  # blocks that every local group has
        self._away: set[str] = set()  # requests with KV that is or was elsewhere
        self._needed: dict[str, int] = {}  # blocks that every group has, wherever it is

    # --- for vLLM

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Return the blocks that ``num_tokens`` need here, or more than exist if groups elsewhere cannot grow."""
        needed = int(cdiv(num_tokens, self.block_size))
        if request_id in self.num_cached_block and needed <= self._covered[request_id]:
            return 0
        if not self.homes.has_room(request_id, num_tokens):
            return int(self.block_pool.num_gpu_blocks) + 1
        if request_id in self.num_cached_block:
            missing = self._missing(request_id, needed)
            lacking = missing - int(self.block_pool.get_num_free_blocks())
            if lacking > 0 and self.relieve is not None:
                self.relieve(lacking, request_id, num_tokens)
                missing = self._missing(request_id, needed)
            return missing
        hits = len(new_computed_blocks) // self.head_groups
        fresh = 1 + len(self._local(request_id)) * (needed - hits)
        return fresh + int(self._get_num_evictable_blocks(new_computed_blocks))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take the blocks of a prefix hit: G for each block of tokens, in the order of the groups."""
        assert request_id not in self._tables, f"{request_id} holds blocks already"
        self.block_pool.touch(new_computed_blocks)
        groups = range(self.head_groups)
        self._begin(request_id, [list(new_computed_blocks[group :: self.head_groups]) for group in groups])
        self.num_cached_block[request_id] = len(new_computed_blocks) // self.head_groups

    def allocate_external_computed_blocks(self, *_: Any, **__: Any) -> None:
        raise AssertionError("no KV comes from outside")

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Extend the tables of local groups, and return the anchor if vLLM does not have it yet."""
        is_new = request_id not in self._tables
        if is_new:
            self._begin(request_id, [[] for _ in range(self.head_groups)])
        needed = cdiv(num_tokens, self.block_size)
        if needed > self._covered[request_id]:
            for group in self._growing(request_id):
                self.extend(request_id, group, needed)
            self._covered[request_id] = self._needed[request_id] = needed
            self.homes.grow(request_id, num_tokens)
        return list(self.req_to_blocks[request_id]) if is_new else []

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Offer the blocks that earlier steps have filled to later requests, if all groups have always been here.

        A prefix hits only with all groups, and blocks that came back from elsewhere are empty if the worker that they
        came from was lost meanwhile.
        """
        request_id = request.request_id
        # Tokens of this step are not among the computed ones yet.
        full = min(num_tokens, request.num_computed_tokens) // self.block_size
        cached = self.num_cached_block.get(request_id, 0)
        if cached >= full or request_id in self._away:
            return
        numbers = {"num_cached_blocks": cached, "num_full_blocks": full, "block_size": self.block_size}
        for group, table in enumerate(self._tables[request_id]):
            self.block_pool.cache_full_blocks(request=request, blocks=table, kv_cache_group_id=group, **numbers)
        self.num_cached_block[request_id] = full

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Return everything that a request holds, its last blocks last."""
        anchor = super().pop_blocks_for_free(request_id)
        self._covered.pop(request_id, None)
        self._needed.pop(request_id, None)
        self._away.discard(request_id)
        tables = self._tables.pop(request_id, None)
        if tables is None:
            return list(anchor)
        self.events.append(Gone(anchor[0].block_id))
        self.homes.released(request_id)
        longest = max(map(len, tables))
        return [*anchor, *chain.from_iterable(table[i : i + 1] for i in range(longest) for table in tables)]

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Return 0: what requests share cannot be seen in their anchors. vLLM calls this up to version 0.31."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: HeadGroupSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Return the longest prefix that all head groups have: blocks in the order of `add_local_computed_blocks`."""
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        groups = list(range(kv_cache_spec.head_groups))
        blocks: list[KVCacheBlock] = []
        for block_hash in islice(hashes, max_length // size):
            cached = block_pool.get_cached_block(block_hash, groups)
            if not cached:
                break
            blocks.extend(cached)
        hit = len(blocks) // len(groups)
        if drop_eagle_block and hit:
            hit -= 1
        del blocks[hit * len(groups) :]
        return (blocks,), hit * size

    # --- for the connector

    def finished(self, request: Request) -> None:
        """Offer the blocks that the last steps of a request have filled. The others are about to be freed."""
        if self.enable_caching and request.request_id in self._tables:
            self.cache_blocks(request, request.num_computed_tokens, replay_boundaries=())

    def extend(self, request_id: str, group: int, blocks: int) -> None:
        """Extend one group's table to this many blocks."""
        table = self._tables[request_id][group]
        if blocks <= len(table):
            return
        fresh = self.block_pool.get_new_blocks(blocks - len(table))
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in fresh)
        numbers = tuple(block.block_id for block in fresh)
        self.events.append(Grown(self.anchor(request_id), group, len(table), numbers))
        table.extend(fresh)

    def free_group(self, request_id: str, group: int) -> None:
        """Free the blocks of a group that now lives elsewhere."""
        table = self._tables[request_id][group]
        self.block_pool.free_blocks(reversed(table))
        table.clear()

    def lost(self, request_id: str) -> None:
        """Rehome a request that lost KV and is recomputed from its first token."""
        self.left(request_id, range(self.head_groups))

    def computed_again(self, request_id: str) -> None:
        """Give a request that is recomputed blocks of its own, in place of those that other requests may read.

        What it writes until its next loss is what they hold, but a loss in the middle of a step leaves wrong KV.
        """
        for group, table in enumerate(self._tables[request_id]):
            if any(block.ref_cnt > 1 or block.block_hash is not None for block in table):
                self.free_group(request_id, group)
                self._covered[request_id] = 0
        self._away.add(request_id)

    def left(self, request_id: str, groups: Sequence[int]) -> None:
        """Free the blocks of those groups of a request that now live elsewhere."""
        self._away.add(request_id)
        tables = self._tables[request_id]
        for group, device in enumerate(self.homes.devices(request_id)):
            if device != LOCAL and tables[group] and group in groups:
                self.free_group(request_id, group)
        self._covered[request_id] = min((len(tables[group]) for group in self._growing(request_id)), default=0)

    def anchor(self, request_id: str) -> int:
        """Return the number that identifies a running request on the ranks."""
        return int(self.req_to_blocks[request_id][0].block_id)

    def blocks_of(self, request_id: str) -> int:
        """Return the blocks that each group of a running request needs for the tokens that it has room for."""
        return max(self._needed[request_id], 1)

    def held(self, request_id: str, group: int) -> int:
        """Return the number of blocks of one group here."""
        return len(self._tables[request_id][group])

    def _missing(self, request_id: str, needed: int) -> int:
        """Return the number of blocks that groups here lack."""
        tables = self._tables[request_id]
        return sum(max(needed - len(tables[group]), 0) for group in self._growing(request_id))

    def _begin(self, request_id: str, tables: list[list[KVCacheBlock]]) -> None:
        anchor = self.block_pool.get_new_blocks(1)[0]
        self.req_to_blocks[request_id] = [anchor]
        self._tables[request_id] = tables
        self._covered[request_id] = self._needed[request_id] = len(tables[0])
        self.num_cached_block.setdefault(request_id, 0)
        self.events.append(self.homes.admitted(request_id, int(anchor.block_id)))
        if len(self._local(request_id)) < self.head_groups:
            self._away.add(request_id)
        grown = {group: tuple(block.block_id for block in table) for group, table in enumerate(tables) if table}
        self.events += [Grown(int(anchor.block_id), group, 0, numbers) for group, numbers in grown.items()]

    def _growing(self, request_id: str) -> list[int]:
        """Return the groups here and those on their way here, which already have blocks that copies fill."""
        tables = self._tables[request_id]
        here = enumerate(self.homes.devices(request_id))
        return [group for group, device in here if device == LOCAL or tables[group]]

    def _local(self, request_id: str) -> list[int]:
        return [group for group, device in enumerate(self.homes.devices(request_id)) if device == LOCAL]
