"""An attention worker that is as slow as another GPU: it computes, and delays its answer.

    python -m benchmarks.measuring.emulated_worker --name w0 --key-file FILE --port-file FILE --pace FILE --pages N

The pace file (`Pace.write`) is read at every step, so that an emulated GPU may slow down while it serves. Waiting takes
no CPU time, so that many workers answer on time even on a machine with few cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hetis.runtime.attention.device import DeviceStep, LocalDevice
from hetis.runtime.attention.kv import KvShape
from hetis.runtime.transport.frames import HEADER_BYTES, Frame, FrameKind, read_step
from hetis.runtime.transport.keys import key_of
from hetis.runtime.transport.pipes import listen
from hetis.runtime.vllm.calibration import token_bytes
from hetis.runtime.worker.core import MakeDevice, WorkerCore
from hetis.runtime.worker.loop import WorkerLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The time that an emulated GPU takes.

    Attributes:
        head_s, kv_byte_s, call_s: seconds of one layer's attention per query head, KV byte read and call.
        slow: factor on these seconds.
        link_bytes_per_s, latency_s: the link to the GPU, in one direction; infinite and 0 emulate no link.
    """

    head_s: float = 4e-4
    kv_byte_s: float = 1e-7
    call_s: float = 1e-2
    slow: float = 1.0
    link_bytes_per_s: float = float("inf")
    latency_s: float = 0.0

    def layer_s(self, step: DeviceStep, shape: KvShape) -> float:
        """Return the seconds of attention for the virtual sequences of ``step``."""
        kv_bytes = float((step.positions + 1).sum()) * token_bytes(shape)
        return self.attention_s(heads=len(step) * shape.queries_per_group, kv_bytes=kv_bytes)

    def attention_s(self, *, heads: int, kv_bytes: float) -> float:
        """Return the seconds of one layer's attention."""
        return self.slow * (self.head_s * heads + self.kv_byte_s * kv_bytes + self.call_s)

    def link_s(self, frame: Frame, answer: Frame | None) -> float:
        """Return the seconds that a frame and its answer, if any, are in transit."""
        num_bytes = sum(HEADER_BYTES + one.body_bytes for one in (frame, answer) if one)
        return num_bytes / self.link_bytes_per_s + (2 * self.latency_s if answer else 0.0)

    def write(self, path: Path) -> None:
        """Write the file for a worker atomically."""
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(asdict(self)), encoding="utf-8")
        aside.replace(path)

    @classmethod
    def read(cls, path: Path) -> Pace:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def wait_until(moment_s: float) -> None:
    """Wait until a moment of `time.perf_counter`, unless it has passed."""
    left_s = moment_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)


class PacedCore(WorkerCore):
    """A worker's core that answers when the emulated GPU would."""

    def __init__(self, name: str, make_device: MakeDevice, *, key: bytes, pace: Path) -> None:
        super().__init__(name, make_device, key=key)
        self._path, self._pace, self._layer_s = pace, Pace.read(pace), 0.0

    def handle(self, frame: Frame) -> Frame | None:
        begun_s = time.perf_counter()
        answer = super().handle(frame)
        seconds = self._pace.link_s(frame, answer)
        if frame.kind is FrameKind.BEGIN and self.device is not None:
            self._pace = Pace.read(self._path)
            self._layer_s = self._pace.layer_s(read_step(frame), self.device.shape)
        elif frame.kind is FrameKind.ATTEND:
            seconds += self._layer_s
        wait_until(begun_s + seconds)
        return answer


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measuring.emulated_worker", description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--key-file", required=True, type=Path)
    parser.add_argument("--port-file", required=True, type=Path)
    parser.add_argument("--pace", required=True, type=Path)
    parser.add_argument("--pages", required=True, type=int)
    options = parser.parse_args()
    logging.basicConfig(level="WARNING")
    torch.set_num_threads(1)
    listener = listen("127.0.0.1", 0)
    core = PacedCore(
        options.name,
        lambda shape: LocalDevice(options.name, shape, options.pages),
        key=key_of(options.key_file.read_text()),
        pace=options.pace,
    )
    aside = options.port_file.with_suffix(".new")
    aside.write_text(f"127.0.0.1:{listener.getsockname()[1]}")
    aside.replace(options.port_file)
    WorkerLoop(core, listener).run()


if __name__ == "__main__":
    main()
