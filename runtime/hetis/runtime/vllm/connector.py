"""vLLM's KV connector: decisions go from its scheduler to the ranks with every step, and what happened comes back.

No KV passes through it. In the scheduler's process it places the head groups of each request at admission and has the
block manager keep their tables; on the ranks it makes `Rank`, which computes and copies.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from hetis.runtime.vllm.current import set_current_rank
from hetis.runtime.vllm.settings import Settings, SettingsError, read_settings
from hetis.runtime.vllm.steps import LOCAL, Move, MoveStep, RankReport, Rehomed, StepPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from hetis.runtime.vllm.blocks import HeadGroupManager
    from hetis.runtime.vllm.rank import Rank

_log = logging.getLogger(__name__)


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What a step brings to the ranks."""

    plan: StepPlan


@dataclass
class Reports(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the ranks say after a step, by rank."""

    by_rank: dict[int, RankReport] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, Reports)
        return Reports({**self.by_rank, **other.by_rank})


@dataclass
class Greeting(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Blocks of a head group that each worker of a rank holds, by device; 0: it is not there."""

    blocks: tuple[int, ...]


class HetisConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Both sides of the connector, as vLLM makes one of each."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = read_settings()
        if settings is None:
            raise SettingsError("HETIS_VLLM_CONFIG is not set: the connector needs the file that the plugin needs")
        _check(vllm_config, settings)
        self._scheduler = SchedulerSide(settings) if role is KVConnectorRole.SCHEDULER else None
        self._rank: Rank | None = None
        self._settings, self._rank_number = settings, 0

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # --- on a rank

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from hetis.runtime.vllm.assembly import make_rank, rank_number

        self._rank_number = rank_number()
        self._rank = make_rank(self._vllm_config, self._kv_cache_config, self._settings, self._rank_number)
        set_current_rank(self._rank)

    def get_handshake_metadata(self) -> Greeting | None:
        rank = self._here
        return Greeting(tuple(rank.blocks(number) for number in range(1, len(rank.workers.names) + 1)))

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepMetadata)
        self._here.apply(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **_: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        self._here.finish_step()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._here.take_void()

    def build_connector_worker_meta(self) -> Reports | None:
        report = self._here.take_report()
        return Reports({self._rank_number: report}) if report else None

    def shutdown(self) -> None:
        if self._rank is not None:
            self._rank.close()
            set_current_rank(None)
            self._rank = None

    # --- in the scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        assert self._scheduler is not None
        self._scheduler.bind(kv_cache_manager)

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._decider.greet({where: one.blocks for where, one in metadata.items() if isinstance(one, Greeting)})

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self._decider.place(request, num_computed_tokens)
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The block manager has told all there is to know."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        return StepMetadata(self._decider.plan())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        reports = connector_output.kv_connector_worker_meta
        self._decider.hear_void(connector_output.invalid_block_ids)
        if isinstance(reports, Reports):
            self._decider.hear(reports.by_rank)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._decider.finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    # --- inside

    @property
    def _here(self) -> Rank:
        assert self._rank is not None, "vLLM registers its caches first"
        return self._rank

    @property
    def _decider(self) -> SchedulerSide:
        assert self._scheduler is not None, "this is asked of the scheduler's side"
        return self._scheduler


class SchedulerSide:
    """What the connector does in the scheduler's process: places requests, and tells the ranks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._plans = 0
        self._manager: HeadGroupManager
        self._copied: dict[int, set[int]] = {}  # ranks that have copied a move
        self._blocks: dict[tuple[int, int], list[int]] = {}  # of each worker, by rank
        self._requests: dict[str, Request] = {}

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """Meets vLLM's block manager, which must be ours."""
        # Compiled code is loaded here and not before: vLLM, as it starts, looks into everything that is loaded.
        from hetis.runtime.vllm.allocator import HeadAllocator
        from hetis.runtime.vllm.assembly import first_costs
        from hetis.runtime.vllm.blocks import HeadGroupManager
        from hetis.runtime.vllm.redispatch import Redispatch
        from hetis.solver.dispatch.warming import compile_dispatch

        [manager] = kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, HeadGroupManager), "all layers of the model have KV of head groups"
        self._manager = manager
        pool, dispatch = kv_cache_manager.block_pool, self._settings.dispatch
        names = [worker.name for worker in self._settings.workers]
        self.allocator = HeadAllocator(
            first_costs(manager.kv_cache_spec, names),
            free_here=pool.get_num_free_blocks,
            policy=dispatch.policy,
            output_tokens=dispatch.expected_output_tokens,
        )
        manager.homes = self.allocator
        manager.relieve = self.relieve
        self._redispatch = Redispatch(self.allocator, self.begin_move, self._settings.redispatch) if names else None
        if names and dispatch.policy == "solver":
            _log.info("loading the dispatcher, which is compiled once per machine: a minute or two")
            compile_dispatch()

    def greet(self, blocks: Mapping[tuple[int, int], tuple[int, ...]]) -> None:
        """The ranks have connected to their workers."""
        self._blocks = {where: list(counts) for where, counts in blocks.items()}
        for device in range(1, len(self._settings.workers) + 1):
            self._settle(device)

    def place(self, request: Request, num_computed_tokens: int) -> None:
        """vLLM is about to admit a request."""
        self._requests[request.request_id] = request
        tokens = request.num_tokens
        most = max(request.max_tokens - request.num_output_tokens, 0)
        self.allocator.place(request.request_id, tokens=tokens, most_output=most, has_hits=num_computed_tokens > 0)

    def finished(self, request: Request) -> None:
        """A request ended; its blocks are about to be freed if it ran."""
        self.allocator.forget(request.request_id)
        self._requests.pop(request.request_id, None)

    def plan(self) -> StepPlan:
        """Everything that the ranks have not been told yet."""
        self._plans += 1
        for number in [n for n, ranks in self._copied.items() if len(ranks) == len(self._blocks)]:
            self._commit(number)
        if self._redispatch is not None:
            self._redispatch.advance()
        events, self._manager.events = self._manager.events, []
        return StepPlan(self._plans, tuple(events))

    def hear(self, reports: Mapping[int, RankReport]) -> None:
        """What the ranks say after a step."""
        for rank, report in reports.items():
            for device, one in report.devices.items():
                for where in self._where(rank):
                    self._blocks[where][device - 1] = one.blocks
                self._settle(device)

            for number in report.copied:
                self._copied.setdefault(number, set()).add(rank)
            for number in report.failed:
                self._abort(number)

    def hear_void(self, anchors: Collection[int]) -> None:
        """Requests whose outputs of a step are void."""
        if anchors:
            for request_id in self.allocator.running:
                if self._manager.anchor(request_id) in anchors:
                    self._compute_again(request_id)

    def begin_move(self, request_id: str, groups: Sequence[int], target: int) -> int | None:
        """Has groups of a running request copied elsewhere while it decodes; they move when all ranks are through.

        Returns the number of the move; None where the target has no room or the groups are not at rest together.
        """
        move = self._prepare(request_id, groups, target)
        if move is None:
            return None
        self._manager.events.append(MoveStep("begin", move))
        return move.number

    def relieve(self, blocks: int) -> None:
        """The pool is short of so many blocks: groups leave at once for workers with room, rather than a request
        being preempted; what is freed now is written by this step at the earliest, after the ranks have copied it."""
        for request_id, groups, target in self.allocator.relief(blocks):
            move = self._prepare(request_id, groups, target)
            if move is not None:
                self._manager.events.append(MoveStep("begin", move))
                self._commit(move.number)
                self.allocator.stats.relieved_blocks += len(groups)

    # --- inside

    def _prepare(self, request_id: str, groups: Sequence[int], target: int) -> Move | None:
        manager = self._manager
        if target == LOCAL:
            needed = len(groups) * manager.blocks_of(request_id)
            if needed > manager.block_pool.get_num_free_blocks():
                return None
        move = self.allocator.prepare(request_id, groups, target)
        if move is not None and target == LOCAL:
            for group in move.groups:
                manager.extend(request_id, group, manager.blocks_of(request_id))
        return move

    def _commit(self, number: int) -> None:
        self._copied.pop(number, None)
        if number not in {move.number for move in self.allocator.moves}:
            return
        request_id, move = self.allocator.commit(number)
        if move.target == LOCAL:
            needed = self._manager.blocks_of(request_id)
            missing = sum(max(needed - self._manager.held(request_id, group), 0) for group in move.groups)
            if missing > self._manager.block_pool.get_num_free_blocks():
                raise AssertionError("a move that came in has no room for what was made meanwhile")
            for group in move.groups:
                self._manager.extend(request_id, group, needed)
        self._manager.events.append(MoveStep("commit", move))
        self._manager.left(request_id, move.groups)

    def _abort(self, number: int) -> None:
        self._copied.pop(number, None)
        ended = self.allocator.abort(number)
        if ended is None:
            return
        request_id, move = ended
        self._manager.events.append(MoveStep("abort", move))
        if move.target == LOCAL:
            for group in move.groups:
                self._manager.free_group(request_id, group)

    def _compute_again(self, request_id: str) -> None:
        """Has vLLM begin a request again.

        With pipeline stages more steps of it may be under way. What they say must not count, be it void or, where one
        of them begins again already, said twice; vLLM itself looks at the step that failed only.
        """
        request = self._requests[request_id]
        request.num_computed_tokens = 0
        request.num_stale_output_tokens, request.drop_stale_output = request.num_in_flight_tokens, True

    def _where(self, rank: int) -> list[tuple[int, int]]:
        places = sorted(self._blocks)
        return [places[rank]] if rank < len(places) else []

    def _settle(self, device: int) -> None:
        """A worker is there when it is there for every rank, with the room of the smallest."""
        blocks = min((counts[device - 1] for counts in self._blocks.values()), default=0)
        if blocks:
            self.allocator.set_blocks(device, blocks)
            return
        for move in self.allocator.moves:
            if move.target == device:  # ranks whose own worker is there still go on with it
                self._abort(move.number)
        for request_id in self.allocator.lose(device):
            self._manager.lost(request_id)
            self._compute_again(request_id)
            self._manager.events.append(
                Rehomed(self._manager.anchor(request_id), tuple(self.allocator.devices(request_id)))
            )
            _log.warning("request %s lost KV with worker %s", request_id, self._settings.workers[device - 1].name)


def _check(vllm_config: VllmConfig, settings: Settings) -> None:
    """Refuses what cannot work together, in one message. Raises SettingsError."""
    parallel, problems = vllm_config.parallel_config, []
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    for worker in settings.workers:
        if len(worker.addresses) != ranks:
            problems.append(f"worker {worker.name} has {len(worker.addresses)} addresses, vLLM has {ranks} ranks")
    if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
        problems.append('--kv-transfer-config needs "kv_load_failure_policy": "recompute"')
    if parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1:
        problems.append("context parallelism splits by tokens what hetis splits by heads")
    if vllm_config.speculative_config is not None:
        problems.append("speculative decoding is not supported yet")
    if problems:
        raise SettingsError("hetis: " + "; ".join(problems))
