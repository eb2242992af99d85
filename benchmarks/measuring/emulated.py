"""Emulated GPUs behind vLLM: the primary in its process, each worker in another, all as slow as specified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring.emulated_worker import Pace
from benchmarks.measuring.vllm_engine import ModelSize, write_model

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
            EngineFailedError: its process has ended.
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
        most_tokens: per request, prompt and output.
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
            command = [sys.executable, "-m", "benchmarks.measuring.emulated_worker", "--name", f"w{number}"]
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
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *(str(ROOT / name) for name in ROOTS)]),
            "HETIS_VLLM_CONFIG": str(config),
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "NUMBA_CACHE_DIR": str(python.parents[1] / "numba"),  # its numba version differs from ours
        }
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
