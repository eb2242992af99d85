"""The layers of a step on attention workers: queries out, answers in, and how long each worker took.

On a GPU a layer's rows for all workers are copied to the host at once. The host waits for that one copy, while the GPU
goes on with what is computed here; the answers go back without a wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from hetis.runtime.attention.kv import DeviceError
from hetis.runtime.vllm.calibration import Calibration
from hetis.runtime.vllm.costs import OVER_READING
from hetis.runtime.vllm.ranks.head_map import Remote
from hetis.runtime.vllm.ranks.step_tensors import Fence
from hetis.runtime.vllm.ranks.workers import ConnectedWorkers
from hetis.runtime.vllm.steps import Exchanged


class Exchange:
    """The exchanges of one rank with its workers."""

    def __init__(
        self,
        workers: ConnectedWorkers,
        lose: Callable[[int, Exception], None],
        calibrations: Mapping[int, Calibration],
        clock: Callable[[], float],
    ) -> None:
        """``lose`` is told of a worker that fails."""
        self._workers, self._lose, self._calibrations, self._clock = workers, lose, calibrations, clock
        self._counted: dict[int, Exchanged] = {}
        self._queries, self._answers = _HostRows(), _HostRows()

    def attend(
        self,
        remotes: Sequence[Remote],
        layer: int,
        qkv: torch.Tensor,
        out: torch.Tensor,
        meanwhile: Callable[[], None],
    ) -> list[Remote]:
        """Compute one layer on workers, and return those that failed. What they should have written is undefined.

        Args:
            remotes: the workers' parts, whose rows are consecutive.
            layer: its number within the stage.
            qkv: rows for workers, shape [V, r + 2, d].
            out: receives the outputs, shape [V, r, d].
            meanwhile: computes what is computed here.
        """
        if not remotes:
            meanwhile()
            return []
        if qkv.device.type != "cpu":
            queries, answers = self._queries.fetch(qkv), self._answers.like(out)
            meanwhile()
            self._queries.fence.wait()
            self._ask_all(remotes, layer, queries)
        else:
            queries, answers = qkv, out
            self._ask_all(remotes, layer, queries)
            meanwhile()
        failed = [one for one in remotes if not self._has_answered(one, answers[one.begin : one.end])]
        if answers is not out:
            out.copy_(answers, non_blocking=True)  # the next layer's `fetch` is queued behind it
        return failed

    def take_counts(self) -> dict[int, Exchanged]:
        """Return the counters of each worker since the last call."""
        counted, self._counted = self._counted, {}
        return counted

    def _ask_all(self, remotes: Sequence[Remote], layer: int, queries: torch.Tensor) -> None:
        for remote in remotes:
            remote.pending = None
            device = self._workers.get(remote.device)
            if device is None:
                continue
            rows = queries[remote.begin : remote.end]
            remote.requested_s = self._clock()
            try:
                remote.pending = device.attend(layer, rows)
            except DeviceError as error:
                self._lose(remote.device, error)
                continue
            remote.sent_s = self._clock()
            counted = self._counted.get(remote.device)
            if counted is None:
                counted = self._counted[remote.device] = Exchanged()
            counted.bytes_sent += rows.nbytes

    def _has_answered(self, remote: Remote, out: torch.Tensor) -> bool:
        """Put a worker's outputs in their place. Return whether it did not fail."""
        if remote.pending is None:
            return False
        waits_s = self._clock()
        try:
            answer = remote.pending.wait()
        except DeviceError as error:
            self._lose(remote.device, error)
            return False
        got_s = self._clock()
        calibration = self._calibrations.get(remote.device)
        read_s = 0.0 if calibration is None else calibration.read_s
        most_s = got_s - remote.requested_s
        # An answer that was already there, maybe for long, only gives a bound.
        was_late = got_s - waits_s > OVER_READING * read_s
        remote.layers.add(most_s if was_late else most_s - (waits_s - remote.sent_s), most_s)
        out.copy_(answer)
        counted = self._counted[remote.device]
        counted.exchanges += 1
        counted.exchange_s += most_s
        counted.bytes_received += answer.nbytes
        return True


class _HostRows:
    """Pinned rows on the host, as many as were ever needed."""

    def __init__(self) -> None:
        self._rows = torch.empty(0)

    def like(self, rows: torch.Tensor) -> torch.Tensor:
        """Return as many rows of the same kind."""
        have = self._rows
        if have.dtype is not rows.dtype or have.shape[1:] != rows.shape[1:] or len(have) < len(rows):
            self._rows = have = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self.fence = Fence(rows.device)
        return have[: len(rows)]

    def fetch(self, rows: torch.Tensor) -> torch.Tensor:
        """Queue the copy of rows of the device, and return where they arrive. Wait for ``fence`` to read them."""
        here = self.like(rows)
        here.copy_(rows, non_blocking=True)
        self.fence.record()
        return here
