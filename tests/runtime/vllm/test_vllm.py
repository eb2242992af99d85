"""Token for token the output of stock vLLM: heads on workers, moved while they decode, workers killed, pipeline stages.

vLLM has a virtual environment of its own (`make vllm`), whose Python runs `engine.py`. One engine does several acts,
because each start takes vLLM some seconds. All rows of the table in docs/vllm.md are in `test_parity.py`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from hetis.engines.workers import CHUNKS, SINKS
from tests.runtime.launch.vllm_python import ENVIRONMENT, PYTHON, PYTHONPATH, ROOT, needs_vllm
from tests.runtime.vllm.checkpoints import make_checkpoint
from tests.runtime.vllm.running import config_of, run_engine, workers

pytestmark = needs_vllm

PLAIN = [{"act": "plain", "seed": seed, "count": 8, "tokens": 32} for seed in (1, 2, 3, 4)]
OTHERS: list[dict[str, Any]] = [
    {"act": "sampled", "seed": 5, "count": 4, "tokens": 24},
    {"act": "prefix", "seed": 6, "count": 4, "tokens": 16},
    {"act": "aborted", "seed": 7, "count": 8, "tokens": 24},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def stock(llama: Path) -> list[Any]:
    """Return the answers of stock vLLM to `PLAIN` and `OTHERS`."""
    results = run_engine(llama, [*PLAIN, *OTHERS], config=None, enable_prefix_caching=True)
    return [one["tokens"] for one in results]


def test_tokens_are_those_of_stock_vllm_with_heads_on_workers(llama: Path, stock: list[Any], tmp_path: Path) -> None:
    with workers(tmp_path, 3) as (pids, addresses):
        ours = run_engine(
            llama,
            [
                PLAIN[0],
                PLAIN[1] | {"act": "moves"},
                PLAIN[2] | {"act": "fault", "signals": [[12, pids[2], "SIGKILL"]]},
                PLAIN[3],
                *OTHERS,
                {"act": "refused"},
            ],
            config=config_of(tmp_path, [[address] for address in addresses]),
            enable_prefix_caching=True,
        )
    *ours, refused = ours
    assert [one["tokens"] for one in ours] == stock
    remote, moved, fault, after, _, prefix, aborted = ours
    assert set(remote["groups_seen"]) >= {"1", "2", "3"}, "every worker had head groups"
    assert moved["moved"] > 10
    assert len(moved["ways"]) > 6, "from and to everywhere"
    assert fault["recomputed"] > 0
    assert "3" not in after["groups_seen"], "the dead worker gets nothing"
    assert prefix["hits"] >= 96
    assert prefix["moved"] > 5, "groups of requests that began with a hit"
    assert aborted["running"] == []
    for part in (
        "recompute",
        "second model runner",
        "--no-async-scheduling",
        "DBO",
        "speculative",
        CHUNKS,
        SINKS,
        "must be HetisConnector",
        "something else than KV of heads (ChunkedLocalAttentionSpec)",
        "layers have different heads",
    ):
        assert part in refused["message"]
    assert refused["variable"] == "0"
    assert refused["seats"] == [8, 32]
    assert refused["kv_heads"] > 1
    assert refused["threshold"] == 128, "sequences up to which TRITON_ATTN divides each: all of its one-headed ones"
    assert (refused["graphs"], refused["variants"]) == ("NONE", ["CPUAttentionBackendImpl"])


def test_pipeline_stages_have_workers_of_their_own(
    llama: Path, stock: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several steps are in progress at a time, and one stage detects a dead worker before the other."""
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,3")
    with workers(tmp_path, 4) as (pids, addresses):
        ours = run_engine(
            llama,
            [
                PLAIN[0] | {"act": "moves"},
                # The process of the second stage; that of the first lives on.
                PLAIN[1] | {"act": "fault", "moves": True, "signals": [[12, pids[1], "SIGKILL"]]},
                PLAIN[2] | {"act": "moves"},
            ],
            config=config_of(tmp_path, [addresses[:2], addresses[2:]]),
            pipeline_parallel_size=2,
            distributed_executor_backend="mp",
            # On a CPU the second stage's buffers are made when the graph is compiled; the backend `eager` compiles
            # nothing, which costs half a minute less. `test_parity.py` has the row with compiled graphs.
            enforce_eager=False,
            compilation_config={"mode": 1, "backend": "eager"},
        )
    assert [one["tokens"] for one in ours] == stock[:3]
    assert ours[0]["moved"] > 5
    assert ours[1]["recomputed"] > 0
    assert ours[1]["lost"] == [1], "the other worker is not blamed"
    assert ours[2]["moved"] > 5


def test_what_a_graph_of_a_whole_step_reads_is_the_present_step(llama: Path, stock: list[Any], tmp_path: Path) -> None:
    """Graphs are stand-ins (`frozen.py`): no GPU has run this. Steps with groups elsewhere are not replayed."""
    graphs = {"act": "freeze"}
    with workers(tmp_path, 1) as (_, addresses):
        first, _, local, then, moved, after = run_engine(
            llama,
            [PLAIN[0], graphs, PLAIN[1], graphs, PLAIN[2] | {"act": "moves"}, graphs],
            config=config_of(tmp_path, [addresses], policy="local"),
        )
    assert [one["tokens"] for one in (first, local, moved)] == stock[:3]
    assert then["replays"] > 20
    assert then["pieces"] == 0
    assert moved["moved"] > 5
    assert after["pieces"] > 5


def test_vllm_has_every_name_that_the_plugin_uses() -> None:
    environment = ENVIRONMENT | {"PYTHONPATH": PYTHONPATH}
    command = [PYTHON, "-m", "tests.runtime.vllm.names"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.partition("names:")[2].split() == []
