"""Frames whose tensors stay on GPUs: headers over TCP, bodies by NCCL, one communicator of two ranks per connection.

Both ends act by the stream of headers, so that what one sends the other is about to receive. A communicator of its
own per pair keeps one slow worker from taking the others with it. What is small or not on a GPU (positions, heads)
goes over TCP. Where the other end dies the TCP connection tells; where NCCL does not come back in time the
communicator is aborted.

Needs two GPUs: NCCL refuses two ranks on one.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from hetis.runtime.transport.channel import PipeChannel
from hetis.runtime.transport.connecting import open_store
from hetis.runtime.transport.errors import ChannelClosedError, ChannelError, ChannelStalledError
from hetis.runtime.transport.frames import Frame, Kind, tensor_of
from hetis.runtime.transport.tcp import TcpPipe

ON_GPU = frozenset({Kind.ATTEND, Kind.OUT, Kind.KV})


class NcclChannel:
    """One end; ``rank`` is 0 at the engine and 1 at the worker."""

    def __init__(self, headers: PipeChannel, group: Any, rank: int, device: str, *, stall_s: float) -> None:
        self.name = f"nccl beside {headers.name}"
        self._headers, self._group, self._peer = headers, group, 1 - rank
        self._device, self._stall_s = torch.device(device), stall_s
        self._stream = torch.cuda.Stream(self._device, priority=-1)

    def send(self, frames: Sequence[Frame]) -> None:
        small: list[Frame] = []
        for frame in frames:
            if frame.kind not in ON_GPU or not frame.body_bytes:
                small.append(frame)
                continue
            size = torch.tensor([frame.body_bytes], dtype=torch.int64)
            self._headers.send([*small, frame._replace(parts=(size,))])
            small = []
            pieces = [tensor_of(part).to(self._device).contiguous().view(-1).view(torch.uint8) for part in frame.parts]
            self._work(torch.cat(pieces), sends=True)
        if small:
            self._headers.send(small)

    def receive(self, timeout_s: float) -> Frame | None:
        frame = self._headers.receive(timeout_s)
        if frame is None or frame.kind not in ON_GPU or not frame.body_bytes:
            return frame
        body = torch.empty(int(frame.body.view(torch.int64)[0]), dtype=torch.uint8, device=self._device)
        self._work(body, sends=False)
        return frame._replace(parts=(body,))

    def close(self) -> None:
        self._headers.close()
        self._group.abort()

    def _work(self, tensor: torch.Tensor, *, sends: bool) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                call = self._group.send if sends else self._group.recv
                call([tensor], self._peer, 0).wait(timedelta(seconds=self._stall_s))
        except RuntimeError as error:
            raise ChannelStalledError(f"{self.name}: {str(error).splitlines()[0]}") from error
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def offer_nccl(headers: PipeChannel, pipe: TcpPipe, device: str, *, stall_s: float) -> NcclChannel:
    """The engine's end: opens a store for this pair alone and tells the worker where. Raises ChannelError."""
    host = pipe.socket.getsockname()[0]
    store = open_store(f"{host}:0", is_master=True, timeout_s=stall_s)
    where = f"{host}:{store.port}/{secrets.token_hex(8)}"
    body = torch.frombuffer(bytearray(where.encode()), dtype=torch.uint8)
    headers.send([Frame(kind=Kind.ATTACH, epoch=0, session=0, counts=(1, 0, 0), parts=(body,))])
    answer = headers.receive(stall_s)
    if answer is None or answer.kind is not Kind.WELCOME:
        raise ChannelClosedError(f"{headers.name}: the worker has no GPU to speak NCCL with")
    return NcclChannel(headers, _group(store, where, 0, stall_s), 0, device, stall_s=stall_s)


def accept_nccl(headers: Any, pipe: TcpPipe, frame: Frame, device: str, *, stall_s: float) -> NcclChannel:
    """The worker's end. Raises ChannelError."""
    where = bytes(frame.raw).decode(errors="replace")
    if not device.startswith("cuda"):
        raise ChannelError(f"{pipe.name}: NCCL was asked for, this worker is on {device}")
    store = open_store(where.partition("/")[0], is_master=False, timeout_s=stall_s)
    headers.send([Frame(kind=Kind.WELCOME, epoch=0, session=0)])
    return NcclChannel(headers, _group(store, where, 1, stall_s), 1, device, stall_s=stall_s)


def _group(store: Any, prefix: str, rank: int, stall_s: float) -> Any:
    """A communicator of two ranks outside of torch's global group: one that fails is aborted alone."""
    from torch.distributed import PrefixStore, distributed_c10d

    kind = getattr(distributed_c10d, "ProcessGroupNCCL", None)
    if kind is None:
        raise ChannelError("this torch is built without NCCL")
    options = kind.Options()
    options.is_high_priority_stream = True
    options._timeout = timedelta(seconds=stall_s)
    return kind(PrefixStore(prefix, store), rank, 2, options)
