"""A replica of emulated cards: the primary in this process, workers in theirs, each as slow as it should be."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.emulated_worker import Pace, wait_until
from examples.demo_serve.checkpoint import Sizes, make_checkpoint
from hetis.runtime.attention.device import AttentionDevice, DeviceStep, Ready
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import engine_from_folder
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.transport.connecting import look_up, open_store
from hetis.runtime.worker.joining import join
from hetis.runtime.worker.remote import RemoteDevice

SIZES = Sizes(layers=2, hidden=256, intermediate=512, q_heads=16, kv_heads=8, vocab=512, max_tokens=1024)
PAGE_TOKENS = 16


class PacedPrimary(LocalDevice):
    """The primary's own attention: the engine waits for it, as it does for a kernel on its own card."""

    def __init__(self, name: str, shape: KvShape, pages: int, pace: Pace) -> None:
        super().__init__(name, shape, pages)
        self._pace, self._layer_s = pace, 0.0

    def begin(self, step: DeviceStep) -> None:
        super().begin(step)
        self._layer_s = self._pace.layer_s(step, self.shape)

    def attend(self, layer: int, qkv: torch.Tensor) -> Ready:
        begun_s = time.perf_counter()
        ready = super().attend(layer, qkv)
        wait_until(begun_s + self._layer_s)
        return ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Running emulated workers. ``paces``: of the primary, then of the workers, by name."""

    folder: Path
    store: Any
    pace_files: Mapping[str, Path]
    pages: int

    def set_paces(self, paces: Sequence[Pace]) -> None:
        """Of the workers, from their next step on."""
        for path, pace in zip(self.pace_files.values(), paces, strict=True):
            pace.write(path)

    def engine(self, paces: Sequence[Pace], *, epoch: int, options: EngineOptions) -> Engine:
        """An engine on the primary and all workers, which hold nothing."""
        self.set_paces(paces[1:])

        def devices(shape: KvShape) -> list[AttentionDevice]:
            workers = [
                join(name, look_up(self.store, name, timeout_s=120), shape, epoch=epoch, timeout_s=120)
                for name in self.pace_files
            ]
            return [PacedPrimary("primary", shape, self.pages, paces[0]), *workers]

        return engine_from_folder(self.folder, devices, page_tokens=PAGE_TOKENS, options=options)


@contextmanager
def emulated_replica(workers: int, *, pages: int) -> Iterator[Replica]:
    """Starts so many workers, with ``pages`` KV pages each, and ends them."""
    with tempfile.TemporaryDirectory(prefix="hetis-emulation-") as text:
        folder = Path(text)
        checkpoint = make_checkpoint(folder / "model", sizes=SIZES)
        store = open_store("127.0.0.1:0", is_master=True)
        files = {f"w{i}": folder / f"w{i}.json" for i in range(1, workers + 1)}
        for path in files.values():
            Pace().write(path)
        command = [sys.executable, "-m", "benchmarks.measuring.emulated_worker", "--store", f"127.0.0.1:{store.port}"]
        processes = [
            subprocess.Popen([*command, "--name", name, "--pace", str(path), "--pages", str(pages)])
            for name, path in files.items()
        ]
        try:
            yield Replica(folder=checkpoint, store=store, pace_files=files, pages=pages)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def close(engine: Engine) -> None:
    """Lets the workers go."""
    for device in engine.stage.devices:
        if isinstance(device, RemoteDevice):
            device.close()
