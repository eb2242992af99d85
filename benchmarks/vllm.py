"""vLLM with the plugin against stock vLLM on a CPU: seconds and tokens for the same answers.

    python -m benchmarks.vllm [--quick] [--json] [--only TEXT] [--rounds N] [--python PYTHON]

Engines: *stock*; *local*, the plugin without workers; *shm* and *tcp* with one to three attention workers, each a
process with one thread. Every engine is one process with one thread and runs vLLM in eager mode. A round sends each the
requests in turn, after short ones that are not counted. `equal` reports whether greedy tokens are stock's. `wall_s` and
`worker_cpu_s` (CPU seconds of the engine's process) are the least of the rounds. `ratio_to_stock` and `cpu_ratio` are
medians over the rounds of wall and CPU seconds over stock's in the same round; on a shared machine, only the second is
meaningful. If workers share the engine's cores, wall seconds include theirs.

*batch* is 16 requests of 200 to 1,500 prompt and 100 to 300 output tokens at once, *single* one of 500 and 200,
*sampled* is *batch* at temperature 1. In *memory*, with 8 requests of 100 to 300 and 200 to 400, all engines have KV
for a third of the tokens: stock lets requests wait and preempts, while the plugin holds the rest on workers. A step of
8 requests spends its time on reading weights, as a step of a hundred does on a GPU. *memory of many* has 24 requests: a
CPU core computes so long for each that a larger batch saves little.

vLLM needs its own environment: `make vllm`, or `--python`.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from benchmarks.measuring.vllm_engine import HALF, ModelSize, write_model

ROOT = Path(__file__).parents[1]
TINY = ModelSize(hidden=256, middle=320, layers=4, q_heads=8, kv_heads=4, vocab=1_000)
ROOTS = ("engines", "formats", "planner", "profiler", "proto", "runtime", "simulator", "solver")
BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A set of prompts for every engine.

    Attributes:
        prompt_tokens, output_tokens: fewest and most tokens per request.
        kv_share: share of the batch's tokens that the engine's own KV holds; None: it has room for more than all.
        engines: the engines to compare, each with its number of workers; stock comes first.
    """

    name: str
    batch: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    temperature: float = 0.0
    kv_share: float | None = None
    engines: Sequence[tuple[str, int]] = (("stock", 0), ("local", 0), ("shm", 3))

    def requests(self, vocab: int) -> tuple[list[list[int]], list[int]]:
        """Return prompts, and the number of tokens that each should get."""
        source = random.Random(1)
        prompts = [
            [source.randrange(3, vocab) for _ in range(source.randint(*self.prompt_tokens))] for _ in range(self.batch)
        ]
        return prompts, [source.randint(*self.output_tokens) for _ in range(self.batch)]


ALL = (("stock", 0), ("local", 0), ("shm", 1), ("shm", 2), ("shm", 3), ("tcp", 1), ("tcp", 3))
SHORT = (("stock", 0), ("shm", 1), ("shm", 3))
FULL = (
    Case(name="batch", batch=16, prompt_tokens=(200, 1500), output_tokens=(100, 300), engines=ALL),
    Case(name="single", batch=1, prompt_tokens=(500, 500), output_tokens=(200, 200)),
    Case(name="sampled", batch=16, prompt_tokens=(200, 1500), output_tokens=(100, 300), temperature=1.0),
    Case(
        name="memory",
        batch=8,
        prompt_tokens=(100, 300),
        output_tokens=(200, 400),
        kv_share=1 / 3,
        engines=SHORT,
    ),
    Case(
        name="memory of many",
        batch=24,
        prompt_tokens=(100, 300),
        output_tokens=(200, 400),
        kv_share=1 / 3,
        engines=SHORT,
    ),
)
FEW = (("stock", 0), ("local", 0), ("shm", 1))
QUICK = (
    Case(name="batch", batch=6, prompt_tokens=(20, 60), output_tokens=(12, 24), engines=FEW),
    Case(name="memory", batch=6, prompt_tokens=(80, 120), output_tokens=(40, 60), kv_share=1 / 3, engines=FEW),
)


@dataclass(slots=True, kw_only=True)
class _Engine:
    """A running engine and its answers so far."""

    kind: str
    workers: int
    process: subprocess.Popen[str]
    blocks: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send one line and read the answer. Raises SystemExit if the engine has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """Return the next answer."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return answer
        raise SystemExit(f"benchmarks.vllm: the engine {self.kind} with {self.workers} workers ended with an error")


def run(cases: Sequence[Case], model: Path, vocab: int, python: Path, rounds: int) -> Iterator[Row]:
    """Yield one row for each case and engine, once all rounds of the case are done."""
    for case in cases:
        prompts, tokens = case.requests(vocab)
        asked = {"prompts": prompts, "tokens": tokens, "temperature": case.temperature}
        with ExitStack() as stack:
            running = [_start(stack, case, kind, count, model, python, prompts, tokens) for kind, count in case.engines]
            for engine in running:
                engine.ask(asked | {"prompts": [prompt[:40] for prompt in prompts], "tokens": [4] * len(prompts)})
            for _ in range(rounds):
                for engine in running:
                    engine.answers.append(engine.ask(asked))
        stock = running[0]
        for engine in running:
            walls = [answer["wall_s"] for answer in engine.answers]
            ratios = [mine / theirs["wall_s"] for mine, theirs in zip(walls, stock.answers, strict=True)]
            cpu = [a["cpu_s"] / b["cpu_s"] for a, b in zip(engine.answers, stock.answers, strict=True)]
            same = [a["tokens"] == b["tokens"] for a, b in zip(engine.answers, stock.answers, strict=True)]
            yield {
                "name": f"{case.name}, {engine.kind}" + (f", {engine.workers} workers" if engine.workers else ""),
                "case": case.name,
                "engine": engine.kind,
                "workers": engine.workers,
                "equal": "sampled" if case.temperature else "yes" if all(same) else "no",
                "wall_s": min(walls),
                "worker_cpu_s": min(answer["cpu_s"] for answer in engine.answers),
                "tokens_per_s": sum(tokens) / min(walls),
                "blocks": engine.blocks,
                "preempted": engine.answers[-1]["preempted"],
                "ratio_to_stock": statistics.median(ratios),
                "cpu_ratio": statistics.median(cpu),
            }


def _start(
    stack: ExitStack,
    case: Case,
    kind: str,
    count: int,
    model: Path,
    python: Path,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
) -> _Engine:
    """Start an engine with its workers; the stack stops them."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    total = sum(len(prompt) + more for prompt, more in zip(prompts, tokens, strict=True))
    groups = 1 if kind == "stock" else json.loads((model / "config.json").read_text())["num_key_value_heads"]
    share = case.kv_share or 1.25
    longest = max(len(prompt) + more for prompt, more in zip(prompts, tokens, strict=True))
    how: dict[str, Any] = {
        "model": str(model),
        "enforce_eager": True,
        "block_size": BLOCK_TOKENS,
        "max_model_len": longest + 1,
        "max_num_seqs": case.batch,
        "max_num_batched_tokens": 2048,
        "num_gpu_blocks_override": groups * max(int(share * total), longest + BLOCK_TOKENS) // BLOCK_TOKENS
        + 2 * case.batch,
    }
    environment = os.environ | {
        # use this tree, even if vLLM's environment was made for another
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ROOTS),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "NUMBA_CACHE_DIR": str(python.parents[1] / "numba"),  # vLLM's environment may have another numba than ours
    }
    environment.pop("HETIS_VLLM_CONFIG", None)
    if kind != "stock":
        environment["HETIS_VLLM_CONFIG"] = str(_configure(stack, folder, kind, count))
        how["kv_transfer_config"] = {
            "kv_connector": "HetisConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
        }
    process = subprocess.Popen(
        [python, "benchmarks/measuring/vllm_engine.py"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    engine = _Engine(kind=kind, workers=count, process=process)
    engine.blocks = engine.ask(how)["blocks"]
    return engine


def _configure(stack: ExitStack, folder: Path, kind: str, count: int) -> Path:
    """Start the workers and return the path of the plugin's configuration file."""
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text("of a benchmark, on loopback alone")
    listed = []
    for number in range(count):
        port = folder / f"{number}.port"
        worker = subprocess.Popen(
            [
                *(sys.executable, "-m", "hetis.runtime.worker", "--name", f"w{number}", "--listen", "127.0.0.1:0"),
                *("--port-file", str(port), "--kv-memory", "1GiB", "--device", "cpu", "--key-file", str(key)),
            ],
            stderr=subprocess.DEVNULL,
        )
        stack.callback(worker.wait)
        stack.callback(worker.kill)
        while not port.exists():
            try:
                worker.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            raise SystemExit(f"benchmarks.vllm: attention worker {number} ended with status {worker.returncode}")
        listed.append({"name": f"w{number}", "addresses": [port.read_text().strip()], "keyFile": str(key)})
    path = folder / "workers.json"
    transport = kind if kind in ("shm", "tcp") else "auto"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "hetis/v1",
                "kind": "VllmWorkers",
                "timeoutS": 60,
                "transport": transport,
                "workers": listed,
            }
        )
    )
    return path


def main() -> None:
    """Run the command line."""
    parser = rows.parser("benchmarks.vllm", __doc__)
    rows.add_rounds(parser, "rounds that count; 3, with --quick 1")
    parser.add_argument("--python", metavar="PYTHON", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    arguments = parser.parse_args()
    if not arguments.python.exists():
        parser.error(f"{arguments.python} is not there: make vllm, or say --python")
    quick = arguments.quick
    cases = [case for case in (QUICK if quick else FULL) if arguments.only in case.name]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_model(model, TINY if quick else HALF, most_tokens=2048)
        vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        rounds = arguments.rounds or (1 if quick else 3)
        answers = run(cases, model, vocab, arguments.python, rounds)
        rows.show(answers, arguments, name="vllm")


if __name__ == "__main__":
    main()
