"""vLLM's KV connector: carries decisions from its scheduler to the ranks with every step, and results back.

No KV passes through it. In the scheduler's process it places the head groups of each request at admission and has the
block manager keep their tables; on the ranks it makes `Rank`, which computes and copies.
"""

from __future__ import annotations

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
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from hetis.runtime.vllm.counts import COUNTERS, DISPATCH_BUCKETS, DISPATCH_SECONDS, GAUGES, Described, merged, summary
from hetis.runtime.vllm.plugin import MODEL_RUNNER
from hetis.runtime.vllm.ranks.rank import set_current_rank
from hetis.runtime.vllm.scheduler import SchedulerSide
from hetis.runtime.vllm.settings import PluginSettings, SettingsError, read_settings
from hetis.runtime.vllm.steps import RankReport, StepPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from hetis.runtime.vllm.calibration import Calibration
    from hetis.runtime.vllm.ranks.rank import Rank


class HetisStats(KVConnectorStats):  # type: ignore[misc]
    """The counts of an interval as plain data, which vLLM carries from the scheduler to its metrics."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return HetisStats(merged(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        return summary(self.data)

    def is_empty(self) -> bool:
        return not self.data


class HetisPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counters, gauges and a histogram next to vLLM's, with vLLM's labels."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def described(name: str, one: Described) -> dict[str, Any]:
            return {"name": name, "documentation": one.text, "labelnames": [*labelnames, *one.labels]}

        latest, buckets = "mostrecent", list(DISPATCH_BUCKETS)
        self._gauges = {n: self._gauge_cls(**described(n, one), multiprocess_mode=latest) for n, one in GAUGES.items()}
        self._counters = {n: self._counter_cls(**described(n, one)) for n, one in COUNTERS.items()}
        self._dispatch = self._histogram_cls(**described("hetis_dispatch_seconds", DISPATCH_SECONDS), buckets=buckets)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        for name, samples in transfer_stats_data.get("gauges", {}).items():
            for label, value in samples.items():
                self._gauges[name].labels(*values, *filter(None, label.split("|"))).set(value)
        for name, samples in transfer_stats_data.get("counters", {}).items():
            for label, value in samples.items():
                self._counters[name].labels(*values, *filter(None, label.split("|"))).inc(value)
        for seconds in transfer_stats_data.get("dispatch_s", ()):
            self._dispatch.labels(*values).observe(seconds)


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """The scheduler's message to the ranks for one step."""

    plan: StepPlan


@dataclass
class Reports(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """The reports of the ranks after a step, by rank."""

    by_rank: dict[int, RankReport] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, Reports)
        return Reports({**self.by_rank, **other.by_rank})


@dataclass
class RankHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """A rank's findings, by device: the blocks of a head group that each worker holds (0 if it is absent), and the cost
    of attention on the workers and on the rank itself.
    """

    blocks: tuple[int, ...]
    calibrations: dict[int, Calibration] = field(default_factory=dict)


class HetisConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Both sides of the connector. vLLM creates one instance for each."""

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

    def get_handshake_metadata(self) -> RankHandshake | None:
        rank = self._here
        blocks = tuple(rank.blocks(number) for number in range(1, len(rank.workers.names) + 1))
        return RankHandshake(blocks, rank.calibrations)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepMetadata)
        self._here.apply(kv_connector_metadata.plan)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        from hetis.runtime.vllm.backend import veto_replay

        super().bind_connector_metadata(connector_metadata)
        veto_replay(self._here, self._vllm_config)

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """Do nothing: no KV is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: no KV is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **_: Any) -> None:
        """Do nothing: no KV is saved."""

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
        if self._scheduler is not None:
            self._scheduler.close()

    # --- in the scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        from hetis.runtime.vllm.assembly import engine_shape
        from hetis.runtime.vllm.blocks import HeadGroupManager
        from hetis.runtime.vllm.executing import surround

        [manager] = kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, HeadGroupManager), "all layers of the model have KV of head groups"
        self._decider.bind(manager, engine_shape(self._vllm_config, manager.kv_cache_spec))
        surround(self._decider)

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        found = {where: one for where, one in metadata.items() if isinstance(one, RankHandshake)}
        self._decider.workers_connected(
            {where: one.blocks for where, one in found.items()},
            {where: one.calibrations for where, one in found.items()},
        )

    def on_new_request(self, request: Request) -> None:
        self._decider.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self._decider.place(request, num_computed_tokens)
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Do nothing: the block manager has reported everything."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        return StepMetadata(self._decider.plan())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        reports = connector_output.kv_connector_worker_meta
        self._decider.recompute_void(connector_output.invalid_block_ids)
        if isinstance(reports, Reports):
            self._decider.take_reports(reports.by_rank)

    def get_kv_connector_stats(self) -> HetisStats | None:
        data = None if self._scheduler is None else self._scheduler.take_stats()
        return None if data is None else HetisStats(data)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HetisStats:
        return HetisStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any, **more: Any) -> HetisPromMetrics:
        return HetisPromMetrics(*arguments, **more)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._decider.finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    @property
    def _here(self) -> Rank:
        assert self._rank is not None, "vLLM registers its caches first"
        return self._rank

    @property
    def _decider(self) -> SchedulerSide:
        assert self._scheduler is not None, "this is asked of the scheduler's side"
        return self._scheduler


def _check(vllm_config: VllmConfig, settings: PluginSettings) -> None:
    """Refuse incompatible configurations, in one message. Raises SettingsError."""
    parallel, problems = vllm_config.parallel_config, []
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    for worker in settings.workers:
        if len(worker.addresses) != ranks:
            problems.append(f"worker {worker.name} has {len(worker.addresses)} addresses, vLLM has {ranks} ranks")
    if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
        problems.append('--kv-transfer-config needs "kv_load_failure_policy": "recompute"')
    if parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1:
        problems.append("context parallelism splits by tokens what hetis splits by heads")
    if parallel.data_parallel_size > 1:
        problems.append("data-parallel engines cannot share workers: start each by itself, with a file of its own")
    if vllm_config.speculative_config is not None:
        problems.append("speculative decoding is not supported yet")
    if vllm_config.use_v2_model_runner:
        why = "vLLM's second model runner cannot compute running requests again"
        problems.append(f"{why}: set {MODEL_RUNNER}=0, and leave out what needs it")
    if vllm_config.scheduler_config.async_scheduling:
        problems.append("scheduling ahead leaves no way to compute running requests again: --no-async-scheduling")
    if parallel.use_ubatching:
        problems.append("micro-batches (DBO) would share one description of a step")
    if problems:
        raise SettingsError("hetis: " + "; ".join(problems))
