"""Our engine, as `python -m benchmarks.measuring.engine_ours KIND MODEL BATCH MOST_TOKENS`.

KIND is `one` (a device), `three` (devices in the process), `shm` or `tcp` (three worker processes beside the primary).
Every device has just the pages of its share, so that the heads are spread evenly whatever the dispatcher thinks.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.engine_answering import Generate, answer
from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import EngineOptions
from hetis.runtime.engine.generate import engine_from_folder
from hetis.runtime.engine.generate import generate as answers_of
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.model.config import read_config
from hetis.runtime.transport.connecting import ChannelKind, look_up, open_store
from hetis.runtime.worker.joining import join

WORKERS = ("w0", "w1", "w2")
IN_PROCESS = {"one": 1, "three": 3}


def start(stack: ExitStack, kind: str, model: Path, *, batch: int, most_tokens: int) -> Generate:
    """An engine with heads on the devices of ``kind``."""
    torch.set_num_threads(1)
    heads = batch * read_config(model).kv_heads
    num = IN_PROCESS.get(kind, 1 + len(WORKERS))
    store: Any = None if kind in IN_PROCESS else open_store("127.0.0.1:0", is_master=True)

    def devices(shape: KvShape) -> Sequence[AttentionDevice]:
        pages = -(-heads // num) * shape.pages(most_tokens)
        if store is None:
            return [LocalDevice(f"local{i}", shape, pages) for i in range(num)]
        stack.enter_context(_worker_processes(store, pages * shape.page_bytes))
        workers = [
            join(name, look_up(store, name, timeout_s=60), shape, epoch=1, kind=ChannelKind(kind), timeout_s=60)
            for name in WORKERS
        ]
        return [LocalDevice("primary", shape, pages), *workers]

    engine = engine_from_folder(model, devices, options=EngineOptions(growth_tokens=most_tokens))

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        return [found.tokens for found in answers_of(engine, prompts, params)]

    return generate


@contextmanager
def _worker_processes(store: Any, kv_bytes: int) -> Iterator[None]:
    common = ["--store", f"127.0.0.1:{store.port}", "--kv-memory", f"{kv_bytes}B", "--log-level", "warning"]
    processes = [
        subprocess.Popen([sys.executable, "-m", "hetis.runtime.worker", "--name", name, *common]) for name in WORKERS
    ]
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def main() -> None:
    """Until stdin ends."""
    kind, folder, batch, most_tokens = sys.argv[1:]
    with ExitStack() as stack:
        answer(lambda: start(stack, kind, Path(folder), batch=int(batch), most_tokens=int(most_tokens)))


if __name__ == "__main__":
    main()
