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
from typing import Any

import numpy as np
import torch

from hetis.runtime.attention.device import DeviceStep
from hetis.runtime.attention.kv import DeviceError, KvShape, SequenceKey
from hetis.runtime.vllm.calibration import Calibration, token_bytes
from hetis.runtime.vllm.costs import LayerTime
from hetis.runtime.vllm.ranks.exchange import Exchange
from hetis.runtime.vllm.ranks.head_map import (
    NOWHERE,
    IntArray,
    LayerCall,
    LayerTimes,
    LocalAttention,
    RankHeadMap,
    Remote,
    StepRequests,
    attend_directly,
    part_of,
    slots_of,
)
from hetis.runtime.vllm.ranks.layer_rows import LayerRows
from hetis.runtime.vllm.ranks.step_tensors import Step, StepDescription, StepLimits, StepTensors
from hetis.runtime.vllm.ranks.workers import BlockStore, ConnectedWorkers, KvMigrator
from hetis.runtime.vllm.steps import LOCAL, Admitted, Gone, Grown, MoveStep, RankReport, Rehomed, StepPlan, WorkerReport

_rank: Rank | None = None


def current_rank() -> Rank:
    """Return the rank that the connector has made. Raises RuntimeError if vLLM was started without it."""
    if _rank is None:
        raise RuntimeError("hetis needs its connector: start vLLM with --kv-transfer-config as docs/vllm.md says")
    return _rank


def has_rank() -> bool:
    """Return whether the connector has made a rank."""
    return _rank is not None


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
        limits: StepLimits,
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
        self._head_groups, self._block_tokens, self._limits = head_groups, block_tokens, limits
        self._tensors: StepTensors | None = None
        self._current: Step | None = None
        self._plan, self._number = -1, 0
        # Where captured graphs read a step (`StepTensors.addresses`)
        self.captured: set[tuple[int, ...]] = set()
        self._unread: IntArray | None = None  # tokens after the last step of the requests that only the device knows
        self._void: set[int] = set()  # anchors of this step's void requests
        self._calibrations = {} if calibrations is None else calibrations
        self._exchange = Exchange(workers, self._lose, self._calibrations, clock)
        self._reports: dict[int, WorkerReport] = {}  # of workers that came or were lost
        self._joined: set[int] = set()
        # Of steps that only decoded on a device: sequences, their tokens, times
        self._taken: dict[int, deque[tuple[int, int, LayerTimes]]] = {}
        self._reported_s = clock()

    # --- between steps

    def apply(self, plan: StepPlan) -> None:
        """Apply what has changed, once for each plan, however often vLLM passes it."""
        if plan.number == self._plan:
            return
        self._plan = plan.number
        self._read_requests()
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
        step, self._current = self._current, None
        if step is None:
            return
        if step.must_attend:
            raise RuntimeError("vLLM replayed a graph for a step that it does not compute: set graphs: piecewise")
        if (local := step.local) is not None:
            self._remember(LOCAL, len(local), local.num_tokens, local.lasts_cpu, step.layers)
        if (requests := step.requests) is None:
            assert local is not None, "with all groups here something is computed here"
            self._unread = step.common.seq_lens_cpu_upper_bound[: step.common.num_reqs].numpy().astype(np.int64)
            return
        self._set_tokens(requests.rows, requests.lasts)
        for remote in step.remotes:
            part = remote.part
            if (device := self.workers.get(remote.device)) is not None:
                with self._guarded(remote.device):
                    device.finish(self._number)
                self._remember(remote.device, len(part), part.num_tokens, part.lasts, remote.layers)

    def _read_requests(self) -> None:
        """Note the tokens of the requests of a step of which only the device knew which they are.

        By now vLLM has read what that step sampled, so nothing is waited for.
        """
        if self._unread is not None and self._tensors is not None:
            lasts, self._unread = self._unread, None
            self._set_tokens(self.heads.row_of[self._tensors.read_anchors(len(lasts))], lasts)

    def _set_tokens(self, rows: IntArray, lasts: IntArray) -> None:
        self.heads.tokens[rows] = lasts
        self.heads.tokens[self.heads.must_restart] = 0  # none of their KV is worth copying
        self.heads.tokens[0] = 0  # of nobody

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
            for device, exchanged in self._exchange.take_counts().items():
                self._reports.setdefault(device, WorkerReport(0)).exchanged = exchanged
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

    def begin(self, common: Any) -> Step:
        """Return the step that vLLM describes, announced to the workers that take part. All layers share it."""
        if self._current is not None and self._current.common is common:
            return self._current
        self._read_requests()
        self._abandon()  # a step that was never finished: vLLM may warm up without the connector
        self._number += 1
        device = common.query_start_loc.device
        if self._tensors is None or self._tensors.device != device:
            self._tensors = StepTensors(self.heads, self._limits, self._block_tokens, device)
        if self.heads.is_local and self.migrator.is_idle and common.seq_lens_cpu_upper_bound is not None:
            local = self._tensors.gather(common)
            self._current = Step(common=common, num_tokens=local.num_tokens // self._head_groups, local=local)
        else:
            self._current = self._distributed(common, self._tensors)
        self._current.is_timed = device.type == "cpu"
        return self._current

    @property
    def can_replay(self) -> bool:
        """Return whether a graph captured over a step may compute the present one: all groups are here, each request
        has one token, and the graph reads this step.
        """
        step, tensors = self._current, self._tensors
        if step is None or step.requests is not None or step.local is None or tensors is None:
            return False
        return step.local.is_in_order and tensors.addresses in self.captured

    def capturing(self) -> None:
        """Note where a graph that is captured now will read its steps."""
        if self._tensors is not None:
            self.captured.add(self._tensors.addresses)
        if self._current is not None:
            self._current.is_captured = True

    def must_attend(self) -> None:
        """Make a step fail that ends without having been computed by `attend`."""
        if self._current is not None:
            self._current.must_attend = True

    def _distributed(self, common: Any, tensors: StepTensors) -> Step:
        """Determine where each head group of a step lives, which takes the host to know the requests."""
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
        counts = starts[1:] - starts[:-1]
        num = int(np.count_nonzero(counts))  # without the padding behind
        bound = common.seq_lens_cpu_upper_bound
        anchors = common.block_table_tensor[:num, 0].cpu().numpy()
        requests = StepRequests(
            rows=self.heads.row_of[anchors],
            counts=counts[:num],
            # vLLM's bound is on the CPU already, and exact unless drafts are scheduled ahead.
            lasts=(common.seq_lens if bound is None else bound)[:num].cpu().numpy().astype(np.int64),
        )
        self.migrator.rewind(requests.rows, requests.firsts)
        devices = self.heads.devices[requests.rows]
        if self.heads.must_restart.any():
            self.heads.must_restart[requests.rows[requests.firsts == 0]] = False
            void = self.heads.must_restart[requests.rows]
            devices[void] = NOWHERE
            self._void.update(anchors[void].tolist())
        part = part_of(requests, devices == LOCAL)
        num_tokens, local = int(starts[num]), None
        if len(part):
            width = int(-(-part.lasts.max() // self._block_tokens))
            tables = self.heads.tables[requests.rows[part.requests], part.groups, :width]
            local = tensors.put(part, tables, slots_of(part, tables, self._block_tokens))
        remotes = [] if part.is_everything else self._remotes(requests, devices)
        sorting = None if part.is_everything else tensors.sort(num_tokens, [part, *(one.part for one in remotes)])
        for remote in remotes:
            self._announce(remote, requests)
        return Step(
            common=common, num_tokens=num_tokens, local=local, requests=requests, remotes=remotes, sorting=sorting
        )

    def attend(self, impl: LocalAttention, call: LayerCall, metadata: StepDescription) -> None:
        """Compute the attention of one layer over all head groups, wherever they live."""
        step, base = metadata.step, metadata.base
        step.must_attend = False
        if (tokens := step.num_tokens) < call.out.size(0):
            call.out[tokens:].zero_()
            call = call._replace(q=call.q[:tokens], k=call.k[:tokens], v=call.v[:tokens], out=call.out[:tokens])
        rows = step.rows or self._rows(step, call)
        rows.take(call)
        out = call.out.view(rows.shape)
        if step.sorting is None:
            self._attend_here(step, impl, call, base, rows, out)
        else:
            self._attend_everywhere(step, impl, call, base, rows)
        rows.give(out)

    def _rows(self, step: Step, call: LayerCall) -> LayerRows:
        """Return the memory of a layer, kept for those behind it if each request has one token, as it is small then."""
        local = step.local
        is_in_order = local.is_in_order if local is not None else all(one.part.is_in_order for one in step.remotes)
        here = 0 if local is None else local.num_tokens
        rows = LayerRows(call, self._head_groups, here, step.sorting, is_in_order=is_in_order)
        if is_in_order and not step.is_captured:
            step.rows = rows
        return rows

    def _attend_everywhere(self, step: Step, impl: LocalAttention, call: LayerCall, base: Any, rows: LayerRows) -> None:
        """Compute attention together with workers."""

        def meanwhile() -> None:
            if step.local is not None:
                self._attend_here(step, impl, call, base, rows, rows.answers)

        layer = self._layers[call.layer.layer_name]
        for remote in self._exchange.attend(step.remotes, layer, rows.asked, rows.answers, meanwhile):
            self._make_up(remote, layer, rows.asked, rows.answers, step)

    def _make_up(self, remote: Remote, layer: int, qkv: torch.Tensor, out: torch.Tensor, step: Step) -> None:
        """Compute the requests that begin in this step here, and void the others, as the worker is lost."""
        part, requests = remote.part, step.requests
        assert requests is not None, "a step with workers knows its requests"
        for sequence in range(len(part)):
            first, last = int(part.starts[sequence]), int(part.starts[sequence + 1])
            rows = slice(remote.begin + first, remote.begin + last)
            row = int(requests.rows[part.requests[sequence]])
            self.heads.must_restart[row] = True
            if part.positions[first] == 0:
                q, k, v = qkv[rows, :-2], qkv[rows, -2], qkv[rows, -1]
                out[rows] = attend_directly(q, k, v, self._shape, layer).to(out)
            else:
                out[rows] = 0
                self._void.add(int(self.heads.anchors[row]))

    def _attend_here(
        self, step: Step, impl: LocalAttention, call: LayerCall, base: Any, rows: LayerRows, out: torch.Tensor
    ) -> None:
        """Have vLLM's backend compute virtual sequences, into ``out`` unless the rows have memory for it."""
        assert step.local is not None
        begun_s = self._clock() if step.is_timed else 0.0
        own = LayerCall(call.layer, rows.q, rows.k, rows.v, call.kv_cache, out if rows.own is None else rows.own)
        impl.attend_here(own, step.local.slots, base)
        if step.is_timed:
            taken_s = self._clock() - begun_s
            step.layers.add(taken_s, taken_s)

    def _remotes(self, requests: StepRequests, devices: IntArray) -> list[Remote]:
        """Return the workers' parts of a step; ``devices`` is [R, G]."""
        remotes, begin = [], 0
        for number in sorted(set(devices.ravel().tolist()) - {NOWHERE, LOCAL}):
            part = part_of(requests, devices == number)
            remotes.append(Remote(device=number, part=part, begin=begin, end=begin + part.num_tokens))
            begin += part.num_tokens
        return remotes

    def _announce(self, remote: Remote, requests: StepRequests) -> None:
        part = remote.part
        step = DeviceStep(
            epoch=self.workers.epoch,
            number=self._number,
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

    def _remember(
        self, device: int, sequences: int, tokens: int, lasts: torch.Tensor | IntArray, layers: LayerTimes
    ) -> None:
        """Keep the times of a step on a device for the next report, if it only decoded there."""
        if layers.count and tokens == sequences:
            taken = self._taken.setdefault(device, deque(maxlen=MOST_TAKEN))
            taken.append((sequences, int(lasts.sum()), layers))

    def _time_taken(self, sequences: int, tokens: int, layers: LayerTimes) -> LayerTime:
        return LayerTime(
            heads=sequences * self._shape.queries_per_group,
            kv_bytes=float(tokens) * token_bytes(self._shape),
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
        step, self._current = self._current, None
        for remote in step.remotes if step is not None else ():
            if (device := self.workers.get(remote.device)) is not None:
                with self._guarded(remote.device):
                    device.abort(self._number)

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
