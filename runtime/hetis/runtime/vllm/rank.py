"""One rank of vLLM: its head map, its attention workers, and the attention of each layer over all of them.

Local (request, head group) pairs are computed by vLLM's own backend, in one call. Those of workers are sent first,
computed there at the same time, and put in their places at the end: a plain concatenation of heads.

A worker that fails in the middle of a step corrupts no token. Requests that begin in this step are computed here from
the step's own inputs. Other requests with head groups there are *void* until they are recomputed from their first
token: reporting their anchors as blocks that failed to load makes vLLM's scheduler do that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from hetis.runtime.attention.device import DeviceStep
from hetis.runtime.attention.kv import DeviceError, KvShape, SequenceKey
from hetis.runtime.vllm.calibration import Calibration, token_bytes
from hetis.runtime.vllm.costs import OVER_READING, LayerTime
from hetis.runtime.vllm.head_map import (
    Batch,
    IntArray,
    LayerCall,
    LayerTimes,
    LocalAttention,
    RankHeadMap,
    Remote,
    Sorting,
    StepDescription,
    StepRequests,
    VirtualBatch,
    attend_directly,
    part_of,
    slots_of,
)
from hetis.runtime.vllm.steps import LOCAL, Admitted, Gone, Grown, MoveStep, RankReport, Rehomed, StepPlan, WorkerReport
from hetis.runtime.vllm.workers import BlockStore, ConnectedWorkers, KvMigrator

_rank: Rank | None = None


def current_rank() -> Rank:
    """Return the rank that the connector has made. Raises RuntimeError if vLLM was started without it."""
    if _rank is None:
        raise RuntimeError("hetis needs its connector: start vLLM with --kv-transfer-config as docs/vllm.md says")
    return _rank


def set_current_rank(rank: Rank | None) -> None:
    """Set the rank. Called by the connector."""
    global _rank
    _rank = rank


REPORT_S = 1.0  # interval between reports of counters
MOST_TAKEN = 15  # steps per device in a report: as many as costs take their median over


class Rank:
    """The state of one rank."""

    def __init__(
        self,
        shape: KvShape,
        layers: Mapping[str, int],
        head_groups: int,
        num_blocks: int,
        block_tokens: int,
        workers: ConnectedWorkers,
        store: BlockStore,
        *,
        copy_bytes_per_step: int,
        calibrations: dict[int, Calibration] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``layers`` maps vLLM's name of each layer of the stage to its number; ``store`` is the KV of this rank;
        ``calibrations`` holds each device's latest, filled by the function that joins workers.
        """
        self.heads = RankHeadMap(head_groups, num_blocks)
        self.workers = workers  # the attention workers of this rank
        # Copies of head groups in flight
        self.migrator = KvMigrator(self.heads, workers, shape, store, bytes_per_step=copy_bytes_per_step)
        self._shape, self._layers, self._clock = shape, layers, clock
        self._head_groups, self._block_tokens = head_groups, block_tokens
        self._batch: Batch | None = None
        self._plan, self._step = -1, 0
        self._void: set[int] = set()  # anchors of this step's void requests
        self._reports: dict[int, WorkerReport] = {}
        self._calibrations = {} if calibrations is None else calibrations
        self._joined: set[int] = set()
        self._taken: dict[int, deque[tuple[VirtualBatch, LayerTimes]]] = {}  # decode-only parts, by device
        self._reported_s = clock()

    # --- between steps

    def apply(self, plan: StepPlan) -> None:
        """Apply what has changed, once for each plan, however often vLLM passes it."""
        if plan.number == self._plan:
            return
        self._plan = plan.number
        self._abandon()
        self._void.clear()
        for device in self.workers.advance():
            self._reports.setdefault(device, WorkerReport(0)).blocks = self.blocks(device)
            self._joined.add(device)
        for event in plan.events:
            match event:
                case Admitted():
                    self.heads.admit(event)
                case Grown():
                    self.heads.grow(event)
                case Gone():
                    if self._left(event.anchor):
                        self.heads.remove(event)
                case Rehomed():
                    if self._left(event.anchor):
                        self.heads.rehome(event)
                case MoveStep():
                    with self._guarded():
                        self.migrator.take(event)
        with self._guarded():
            self.migrator.advance()

    def finish_step(self) -> None:
        """End the step after all layers."""
        batch, self._batch = self._batch, None
        if batch is not None:
            known = batch.requests.rows >= 0
            self.heads.tokens[batch.requests.rows[known]] = batch.requests.lasts[known]
            self.heads.tokens[self.heads.must_restart] = 0  # none of their KV is worth copying
            self._remember(LOCAL, batch.local, batch.layers)
            for remote in batch.remotes:
                if (device := self.workers.get(remote.device)) is not None:
                    with self._guarded(remote.device):
                        device.finish(self._step)
                    self._remember(remote.device, remote.part, remote.layers)

    def take_void(self) -> set[int]:
        """Return the anchors of this step's requests whose outputs must not be used."""
        void, self._void = self._void, set()
        return void

    def take_report(self) -> RankReport:
        """Return what the scheduler has to know, with counters only from time to time."""
        copied, failed = self.migrator.take_results()
        report = RankReport(copied=copied, failed=failed)
        now_s = self._clock()
        if now_s - self._reported_s >= REPORT_S or any(one.blocks == 0 for one in self._reports.values()):
            self._reported_s = now_s
            for device, one in self._reports.items():
                one.blocks = self.blocks(device)
            report.devices, self._reports = self._reports, {}
            report.taken = {device: [self._time_taken(*one) for one in taken] for device, taken in self._taken.items()}
            report.calibrations = {i: self._calibrations[i] for i in self._joined & self._calibrations.keys()}
            self._taken, self._joined = {}, set()
        return report

    @property
    def calibrations(self) -> dict[int, Calibration]:
        """The calibrations of devices from when they joined, including `LOCAL`."""
        return dict(self._calibrations)

    def blocks(self, number: int) -> int:
        """Return the KV blocks, of vLLM's size, that a worker holds for one head group, or 0 if it is absent."""
        device = self.workers.get(number)
        return 0 if device is None else device.num_pages * self._shape.page_tokens // self._block_tokens

    def close(self) -> None:
        """Close the connections to all workers, because vLLM ends."""
        self.workers.close()

    # --- a step

    def attend(self, impl: LocalAttention, call: LayerCall, metadata: StepDescription) -> None:
        """Compute the attention of one layer over all head groups, wherever they live."""
        batch = self._batch
        if batch is None or batch.common is not metadata.common:
            batch = self._begin(metadata)
        tokens, groups, d = batch.num_tokens, self._head_groups, self._shape.head_dim
        query, key, value, output = call.q, call.k, call.v, call.out
        if tokens < output.size(0):
            output[tokens:].zero_()
            query, key, value, output = (x[:tokens] for x in (query, key, value, output))

        def attend_here(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
            base = batch.base.get(id(metadata.builder))
            if base is None:
                base = batch.base[id(metadata.builder)] = metadata.builder.build_base(
                    batch.local, batch.tables, batch.slots, metadata.common
                )
            begun_s = self._clock()
            impl.attend_here(LayerCall(call.layer, q, k, v, call.kv_cache, out), batch.slots, base)
            if not out.is_cuda:  # on a GPU the call returns before it is done
                taken_s = self._clock() - begun_s
                batch.layers.add(taken_s, taken_s)

        if batch.sorting is None and batch.local.is_in_order:
            rows = tokens * groups
            k, v = key.reshape(rows, 1, d), value.reshape(rows, 1, d)
            attend_here(query.reshape(rows, -1, d), k, v, output.view(rows, -1, d))
            return
        q, out = query.view(tokens, groups, -1, d), output.view(tokens, groups, -1, d)
        k, v = key.view(tokens, groups, 1, d), value.view(tokens, groups, 1, d)
        if batch.sorting is not None:
            number, qkv = self._layers[call.layer.layer_name], torch.cat([q, k, v], dim=2)
            self._attend_everywhere(batch, batch.sorting, number, qkv, attend_here, out)
        else:
            q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
            by_group = torch.empty_like(q)
            attend_here(q, k, v, by_group)
            out.copy_(by_group.view(groups, tokens, -1, d).transpose(0, 1))

    def _begin(self, metadata: StepDescription) -> Batch:
        """Determine where each head group of this step lives, and announce the step to the workers."""
        self._abandon()  # a step that was never finished: vLLM may warm up without the connector
        self._step += 1
        common = metadata.common
        num, bound = common.num_reqs, common.seq_lens_cpu_upper_bound
        anchors = common.block_table_tensor[:num, 0].cpu().numpy()
        starts = common.query_start_loc_cpu[: num + 1].numpy().astype(np.int64)
        requests = StepRequests(
            rows=self.heads.row_of[anchors],
            counts=starts[1:] - starts[:-1],
            # vLLM's bound is on the CPU already, and exact unless drafts are scheduled ahead.
            lasts=(common.seq_lens if bound is None else bound)[:num].cpu().numpy().astype(np.int64),
        )
        known = requests.rows >= 0
        self.migrator.rewind(requests.rows, requests.firsts)
        devices = np.where(known[:, None], self.heads.devices[requests.rows], -1)
        if self.heads.must_restart.any():
            self.heads.must_restart[requests.rows[known & (requests.firsts == 0)]] = False
            void = known & self.heads.must_restart[requests.rows]
            devices[void] = -1
            self._void.update(anchors[void].tolist())
        local = part_of(requests, devices == LOCAL)
        device, num_tokens = common.query_start_loc.device, int(starts[-1])
        rows = requests.rows[local.requests]
        width = int(-(-local.lasts.max(initial=1) // self._block_tokens))
        tables = self.heads.tables[rows, local.groups, :width]
        remotes = [] if local.is_everything else self._remotes(requests, devices, local.num_tokens)
        self._batch = batch = Batch(
            common=common,
            requests=requests,
            num_tokens=num_tokens,
            local=local,
            tables=torch.from_numpy(tables).to(device),
            slots=torch.from_numpy(slots_of(local, tables, self._block_tokens)).to(device),
            remotes=remotes,
            sorting=None if local.is_everything else self._sorting(num_tokens, local, remotes, device),
        )
        for remote in batch.remotes:
            self._announce(remote, requests)
        return batch

    def _remotes(self, requests: StepRequests, devices: IntArray, begin: int) -> list[Remote]:
        """Return the workers' parts of a step; ``devices`` is [R, G]. Their rows begin at ``begin``."""
        remotes = []
        for number in sorted(set(devices.ravel().tolist()) - {-1, LOCAL}):
            part = part_of(requests, devices == number)
            end = begin + part.num_tokens
            remotes.append(Remote(device=number, part=part, begin=begin, end=end))
            begin = end
        return remotes

    def _sorting(self, tokens: int, local: VirtualBatch, remotes: list[Remote], device: torch.device) -> Sorting:
        order = np.concatenate([local.rows, *(remote.part.rows for remote in remotes)])
        places = np.full(tokens * self._head_groups, len(order), np.int64)
        places[order] = np.arange(len(order))
        return Sorting(order=torch.from_numpy(order).to(device), places=torch.from_numpy(places).to(device))

    def _announce(self, remote: Remote, requests: StepRequests) -> None:
        part = remote.part
        step = DeviceStep(
            epoch=self.workers.epoch,
            number=self._step,
            requests=self.heads.numbers[requests.rows[part.requests]],
            incarnations=np.zeros(len(part), np.int64),
            heads=part.groups,
            positions=part.lasts - part.counts,
            counts=part.counts,
        )
        device = self.workers.get(remote.device)
        if device is not None:
            with self._guarded(remote.device):
                device.begin(step)

    def _attend_everywhere(
        self,
        batch: Batch,
        sorting: Sorting,
        layer: int,
        qkv: torch.Tensor,
        attend_here: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None],
        out: torch.Tensor,
    ) -> None:
        """Compute attention together with workers: qkv [T, G, r + 2, d] into out [T, G, r, d]."""
        qkv = qkv.flatten(0, 1).index_select(0, sorting.order)
        # The last row stands for all void rows.
        results = out.new_empty(len(qkv) + 1, *out.shape[2:])
        results[-1] = 0
        for remote in batch.remotes:
            self._ask(remote, layer, qkv[remote.begin : remote.end])
        if here := batch.local.num_tokens:
            q, k, v = (x[:here].contiguous() for x in (qkv[:, :-2], qkv[:, -2:-1], qkv[:, -1:]))
            attend_here(q, k, v, results[:here])
        for remote in batch.remotes:
            rows = slice(remote.begin, remote.end)
            self._answer(remote, layer, qkv[rows], results[rows], batch)
        torch.index_select(results, 0, sorting.places, out=out.flatten(0, 1))

    def _ask(self, remote: Remote, layer: int, qkv: torch.Tensor) -> None:
        remote.pending = None
        device = self.workers.get(remote.device)
        if device is None:
            return
        remote.requested_s = self._clock()
        with self._guarded(remote.device):
            remote.pending = device.attend(layer, qkv)
        remote.sent_s = self._clock()
        report = self._reports.get(remote.device)
        if report is None:
            report = self._reports[remote.device] = WorkerReport(self.blocks(remote.device))
        report.exchanged.bytes_sent += qkv.nbytes

    def _answer(self, remote: Remote, layer: int, qkv: torch.Tensor, out: torch.Tensor, batch: Batch) -> None:
        """Put a worker's outputs in their place, or make up for them."""
        waits_s = self._clock()
        if remote.pending is not None:
            with self._guarded(remote.device):
                answer = remote.pending.wait()
                self._time(remote, waits_s)
                out.copy_(answer)
                exchanged = self._reports[remote.device].exchanged
                exchanged.exchanges += 1
                exchanged.exchange_s += self._clock() - remote.requested_s
                exchanged.bytes_received += answer.nbytes
                return
        self._make_up(remote, layer, qkv, out, batch)

    def _make_up(self, remote: Remote, layer: int, qkv: torch.Tensor, out: torch.Tensor, batch: Batch) -> None:
        """Compute the requests that begin in this step here, and void the others, as the worker is lost."""
        part = remote.part
        for sequence in range(len(part)):
            rows = slice(int(part.starts[sequence]), int(part.starts[sequence + 1]))
            request = int(part.requests[sequence])
            row = int(batch.requests.rows[request])
            self.heads.must_restart[row] = True
            if part.positions[rows.start] == 0:
                q, k, v = qkv[rows, :-2], qkv[rows, -2], qkv[rows, -1]
                out[rows] = attend_directly(q, k, v, self._shape, layer).to(out)
            else:
                out[rows] = 0
                self._void.add(int(self.heads.anchors[row]))

    def _time(self, remote: Remote, waits_s: float) -> None:
        """Record how long a worker took. An answer that was already there, maybe for long, only gives a bound."""
        got_s, calibration = self._clock(), self._calibrations.get(remote.device)
        read_s = 0.0 if calibration is None else calibration.read_s
        most_s = got_s - remote.requested_s
        was_late = got_s - waits_s > OVER_READING * read_s
        remote.layers.add(most_s if was_late else most_s - (waits_s - remote.sent_s), most_s)

    def _remember(self, device: int, part: VirtualBatch, layers: LayerTimes) -> None:
        """Keep the times of a step on a device for the next report, if it only decoded there."""
        if layers.count and part.num_tokens == len(part):
            self._taken.setdefault(device, deque(maxlen=MOST_TAKEN)).append((part, layers))

    def _time_taken(self, part: VirtualBatch, layers: LayerTimes) -> LayerTime:
        return LayerTime(
            heads=len(part) * self._shape.queries_per_group,
            kv_bytes=float(part.lasts.sum()) * token_bytes(self._shape),
            least_s=layers.least_s / layers.count,
            most_s=layers.most_s / layers.count,
        )

    def _left(self, anchor: int) -> bool:
        """Drop what workers hold of a request that leaves, or is recomputed, and its moves. Return whether it ran."""
        row = self.heads.row(anchor)
        if row is None:
            return False
        for number in self.heads.remote_devices(row):
            device = self.workers.get(number)
            if device is not None:
                with self._guarded(number):
                    device.drop([SequenceKey(request, 0, group) for request, group in self.heads.keys_on(row, number)])
        with self._guarded():
            self.migrator.forget(anchor)
        return True

    def _abandon(self) -> None:
        """Forget a step that was begun and never finished, for example of a dummy run."""
        batch, self._batch = self._batch, None
        for remote in batch.remotes if batch is not None else ():
            if (device := self.workers.get(remote.device)) is not None:
                with self._guarded(remote.device):
                    device.abort(self._step)

    @contextmanager
    def _guarded(self, number: int | None = None) -> Iterator[None]:
        """Lose a worker that fails in the block: the one with this number, or else the one that the error names."""
        try:
            yield
        except DeviceError as error:
            self._lose(self.workers.number(error.device) if number is None else number, error)

    def _lose(self, number: int, error: Exception) -> None:
        if self.workers.lose(number, error):
            self._reports[number] = WorkerReport(0)
            self.migrator.lose(number)
            for row in self.heads.with_groups_on(number):
                self.heads.must_restart[row] = True
