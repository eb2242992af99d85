"""Emulated GPUs behind vLLM: the primary in its process, each worker in another, all as slow as specified.

    python -m benchmarks.measuring.emulated --name w0 --key-file FILE --port-file FILE --pace FILE --pages N

This is a worker that is as slow as another GPU: it computes, and delays its answer. The pace file (`Pace.write`) is
read at every step, so that an emulated GPU may slow down while it serves. Waiting takes no CPU time, so that many
workers answer on time even on a machine with few cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.vllm_engine import ModelSize, write_model
from examples.processes import kernel_cache
from hetis.runtime.attention.device import DeviceStep, LocalDevice
from hetis.runtime.attention.kv import KvShape
from hetis.runtime.transport.frames import HEADER_BYTES, Frame, FrameKind, read_step
from hetis.runtime.transport.keys import key_of
from hetis.runtime.transport.pipes import listen
from hetis.runtime.vllm.costs import token_bytes
from hetis.runtime.worker.core import MakeDevice, WorkerCore, WorkerLoop


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measuring.emulated", description=__doc__)
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


ROOT = Path(__file__).parents[2]
ROOTS = ("engines", "formats", "planner", "profiler", "proto", "runtime", "simulator", "solver")
MODEL = ModelSize(hidden=512, middle=512, layers=2, q_heads=16, kv_heads=8, vocab=512)
BLOCK_TOKENS = 32


class EngineFailedError(Exception):
    """The engine's process ended. The message is the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """vLLM on emulated cards."""

    process: subprocess.Popen[str]
    log: Path

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: Sequence[int],
        *,
        rule: str,
        paces: Sequence[Pace],
        later: Sequence[Pace] | None = None,
        followed: bool = True,
    ) -> dict[str, Any]:
        """Return the answer of `emulated_engine` to a traffic. If ``followed``, costs change with the paces.

        Raises:
            EngineFailedError: the engine's process has ended.
        """
        return self.ask(
            {
                "prompts": prompts,
                "tokens": tokens,
                "rule": rule,
                "paces": [asdict(pace) for pace in paces],
                "later": [asdict(pace) for pace in later] if later else None,
                "followed": followed,
            }
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send one line, and return the answering one. Raises EngineFailedError."""
        assert self.process.stdin is not None, "it was started with pipes"
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return answer
        raise EngineFailedError("\n".join(self.log.read_text().splitlines()[-12:]))


@contextmanager
def emulated_replica(
    workers: int, *, python: Path, seats: int, most_tokens: int, growth_tokens: int
) -> Iterator[Replica]:
    """Start this many workers, and vLLM with them in ``python``; stop all on exit.

    Args:
        seats: number of concurrent requests.
        most_tokens: limit on the tokens of a request, prompt and output together.
        growth_tokens: growth for which dispatch reserves room.
    """
    with tempfile.TemporaryDirectory(prefix="hetis-emulation-") as text, ExitStack() as stack:
        folder = Path(text)
        model, key = folder / "model", folder / "key"
        write_model(model, MODEL, most_tokens=1024)
        key.touch(mode=0o600)
        key.write_text("of a benchmark, on loopback alone")
        listed, paces = [], []
        for number in range(1, workers + 1):
            port, pace = folder / f"w{number}.port", folder / f"w{number}.json"
            Pace().write(pace)
            command = [sys.executable, "-m", "benchmarks.measuring.emulated", "--name", f"w{number}"]
            command += ["--key-file", str(key), "--port-file", str(port), "--pace", str(pace), "--pages", "8000"]
            worker = subprocess.Popen(command, cwd=ROOT)
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            while not port.exists():
                try:
                    worker.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
                raise EngineFailedError(f"emulated card {number} ended with status {worker.returncode}")
            listed.append({"name": f"w{number}", "addresses": [port.read_text()], "keyFile": str(key)})
            paces.append(str(pace))
        config = folder / "workers.json"
        document = {
            "apiVersion": "hetis/v1",
            "kind": "VllmWorkers",
            "timeoutS": 120,
            "transport": "tcp",
            "calibrate": False,
        }
        dispatch = {"policy": "solver", "expectedOutputTokens": growth_tokens}
        config.write_text(json.dumps(document | {"workers": listed, "dispatch": dispatch}))
        environment = (
            os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), *(str(ROOT / name) for name in ROOTS)]),
                "HETIS_VLLM_CONFIG": str(config),
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            | kernel_cache(python)
        )
        log = stack.enter_context((folder / "log").open("w"))
        process = subprocess.Popen(
            [python, "-m", "benchmarks.measuring.emulated_engine"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        replica = Replica(process=process, log=folder / "log")
        groups = MODEL.kv_heads
        replica.ask(
            {
                "model": str(model),
                "pace_files": paces,
                "block_size": BLOCK_TOKENS,
                "max_model_len": most_tokens,
                "max_num_seqs": seats,
                "num_gpu_blocks_override": groups * seats * (most_tokens // BLOCK_TOKENS + 1) + 2 * seats,
            }
        )
        yield replica


if __name__ == "__main__":
    main()
