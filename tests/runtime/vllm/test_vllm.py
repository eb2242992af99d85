"""Token for token what stock vLLM says: heads on workers, moved while they decode, workers killed, tensor parallelism.

vLLM has a virtual environment of its own (`make vllm`), whose Python runs `engine.py`. One engine does several acts,
because each start takes vLLM a quarter of a minute.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("HETIS_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
KEY = "a key of sixteen letters or more"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"NOT TESTED: vLLM is not installed in {PYTHON.parents[1]} (make vllm)"
)

Acts = list[dict[str, Any]]


def run_engine(model: Path, acts: Acts, *, config: Path | None, **options: Any) -> list[dict[str, Any]]:
    """What each act returned."""
    scenario = {"model": str(model), "hetis": config is not None, "acts": acts, "options": options}
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        # Its numba is another one: in one folder each would throw away what the other has compiled.
        "NUMBA_CACHE_DIR": str(PYTHON.parents[1] / "numba"),
    }
    environment.pop("HETIS_VLLM_CONFIG", None)
    if config is not None:
        environment["HETIS_VLLM_CONFIG"] = str(config)
    done = subprocess.run(
        [str(PYTHON), "-m", "tests.runtime.vllm.engine"],
        cwd=ROOT,
        env=environment,
        input=json.dumps(scenario),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"vLLM ended with {done.returncode}: {done.stderr[-4000:]}"
    results: list[dict[str, Any]] = json.loads(lines[0].removeprefix("RESULT "))["results"]
    return results


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with heads that vLLM's CPU kernels take."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=997,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


@contextmanager
def workers(folder: Path, count: int) -> Iterator[tuple[list[int], list[str]]]:
    """Attention workers as processes: their process ids and addresses."""
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text(KEY)
    ports = [folder / f"w{i}.port" for i in range(count)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "hetis.runtime.worker",
                "--name",
                f"w{i}",
                "--listen",
                "127.0.0.1:0",
                "--port-file",
                str(port),
                "--kv-memory",
                "64MiB",
                "--device",
                "cpu",
                "--key-file",
                str(key),
            ],
            stderr=subprocess.DEVNULL,
        )
        for i, port in enumerate(ports)
    ]
    try:
        for process, port in zip(processes, ports, strict=True):
            while not port.exists():
                with pytest.raises(subprocess.TimeoutExpired):  # it goes on running
                    process.wait(0.2)
        yield [process.pid for process in processes], [port.read_text().strip() for port in ports]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def config_of(folder: Path, addresses: Sequence[Sequence[str]], policy: str = "remote") -> Path:
    """The plugin's file: a worker for each list of addresses."""
    path = folder / "workers.yaml"
    listed = [
        {"name": f"w{i}", "addresses": list(one), "keyFile": str(folder / "key")} for i, one in enumerate(addresses)
    ]
    document = {
        "apiVersion": "hetis/v1",
        "kind": "VllmWorkers",
        "timeoutS": 30,
        "dispatch": {"policy": policy},
        "workers": listed,
    }
    path.write_text(yaml.safe_dump(document))
    return path


def test_tokens_are_those_of_stock_vllm_with_heads_on_workers(llama: Path, tmp_path: Path) -> None:
    plain = [{"act": "plain", "seed": seed, "count": 8, "tokens": 32} for seed in (1, 2, 3, 4)]
    sampled = {"act": "sampled", "seed": 5, "count": 4, "tokens": 24}
    prefix = {"act": "prefix", "seed": 6, "count": 4, "tokens": 16}
    stock = run_engine(llama, [*plain, sampled, prefix], config=None, enable_prefix_caching=True)
    with workers(tmp_path, 3) as (pids, addresses):
        ours = run_engine(
            llama,
            [
                plain[0],
                plain[1] | {"act": "moves"},
                plain[2] | {"act": "fault", "signals": [[12, pids[2], "SIGKILL"]]},
                plain[3],
                sampled,
                prefix,
            ],
            config=config_of(tmp_path, [[address] for address in addresses]),
            enable_prefix_caching=True,
        )
    assert [one["tokens"] for one in ours] == [one["tokens"] for one in stock]
    remote, moved, fault, after = ours[:4]
    assert set(remote["groups_seen"]) >= {"1", "2", "3"}, "every worker had head groups"
    assert moved["moved"] > 10
    assert len(moved["ways"]) > 6, "from and to everywhere"
    assert fault["recomputed"] > 0
    assert "3" not in after["groups_seen"], "the dead worker gets nothing"


def test_tensor_parallel_ranks_have_workers_of_their_own(llama: Path, tmp_path: Path) -> None:
    acts = [
        {"act": "plain", "seed": 1, "count": 6, "tokens": 24},
        {"act": "plain", "seed": 2, "count": 6, "tokens": 24},
    ]
    stock = run_engine(llama, acts, config=None)
    with workers(tmp_path, 2) as (_, addresses):
        ours = run_engine(
            llama,
            [acts[0], acts[1] | {"act": "moves"}],
            config=config_of(tmp_path, [addresses]),
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
        )
    assert [one["tokens"] for one in ours] == [one["tokens"] for one in stock]
    assert ours[1]["moved"] > 5


def test_dispatch_by_the_solver_where_the_pool_is_short(llama: Path, tmp_path: Path) -> None:
    act = {"act": "pressure", "seed": 2, "count": 10, "tokens": 50}
    [stock] = run_engine(llama, [act], config=None, block_size=32, num_gpu_blocks_override=24)
    with workers(tmp_path, 1) as (_, addresses):
        config = config_of(tmp_path, [addresses], policy="solver")
        [ours] = run_engine(llama, [act], config=config, block_size=32, num_gpu_blocks_override=96)
    assert ours["tokens"] == stock["tokens"]
    assert stock["preempted"] > 0
    assert ours["preempted"] == 0, "groups went to the worker instead"
