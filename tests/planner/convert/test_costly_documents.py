"""Any document of the allowed size costs at most 300 MB and 2 s of a core, even a malicious one."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.errors import DocumentError
from hetis.planner.convert.documents import read_document
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Plan
from hetis.solver.profile import Profile
from hetis.v1 import document_pb2

MOST_MB = 300
MOST_CPU_S = 2.0
SLACK = 3  # a core that is shared, with cold caches, takes longer for the same work
_SIZE = 2_700_000
_HEAD = "apiVersion: hetis/v1\nkind: Cluster\nname: x\nnetwork: {bandwidth: 1Gbps, latency: 1s}\n"
_JSON = '{"apiVersion":"hetis/v1","kind":"Cluster","name":"x","network":{"bandwidth":"1Gbps","latency":"1s"},'


def _texts() -> dict[str, str]:
    names = ",".join(f"n{i}" for i in range(90_000))
    quantities = '{"memory":"1GB","memory_bandwidth":"1GB/s","fp16":"1TFLOPS"}'
    return {
        "wrong entries": _HEAD + "nodes:\n" + "- {q: 1}\n" * (_SIZE // 9),
        "wrong entries, just few enough": _HEAD + "nodes:\n" + "- {q: 1}\n" * 9_900,
        "wrong entries in JSON": _JSON + '"nodes":[' + '{"q":1},' * (_SIZE // 8) + "{}]}",
        "empty lists": _JSON + '"nodes":[' + "[]," * (_SIZE // 3) + "{}]}",
        "endless lists": "a:\n- " * (_SIZE // 5),
        "unknown fields": _JSON + ",".join(f'"k{i}":1' for i in range(190_000)) + "}",
        "equal fields": "{" + '"a":1,' * (_SIZE // 6) + '"b":2}',
        "broken at its end": _HEAD + "nodes:\n" + "- {q: 1}\n" * 45_000 + "}",
        "many types": _JSON + '"gpu_types":{' + ",".join(f'"g{i}":{quantities}' for i in range(30_000)) + "}}",
        "many nodes": _JSON + '"nodes":[' + ",".join(f'{{"name":"a{i}"}}' for i in range(120_000)) + "]}",
        "many names": _HEAD.replace("1s}", "1s, nodes: {matrix: {names: [" + names + "]}}}") + "nodes: []\n",
        "unknown names": _HEAD.replace(
            "1s}", "1s, nodes: {links: [" + ",".join("{between: [x, y]}" for _ in range(5_000)) + "]}}"
        )
        + "nodes:\n"
        + "".join(f"- {{name: n{i}, gpus: [{{type: L4}}]}}\n" for i in range(9_000)),
    }


def _profiles() -> dict[str, str]:
    head = '{"apiVersion":"hetis/v1","kind":"Profile","gpu":"L4",'
    return {
        "profile of wrong samples": head + '"samples":[' + '{"q":1},' * (_SIZE // 8) + "{}]}",
        "profile of unknown fields": head + ",".join(f'"k{i}":1' for i in range(190_000)) + "}",
    }


def _plans() -> dict[str, str]:
    head = '{"apiVersion":"hetis/v1","kind":"Plan","name":"p",'
    return {
        "plan of wrong replicas": head + '"replicas":[' + '{"q":1},' * (_SIZE // 8) + "{}]}",
        "plan of empty lists": head + '"replicas":[' + "[]," * (_SIZE // 3) + "{}]}",
        "plan of many names": head + '"problem":{' + ",".join(f'"k{i}":{{}}' for i in range(150_000)) + "}}",
    }


def _documents() -> Iterator[tuple[type[Any], str, str]]:
    """Yield kind, name and text."""
    for kind, texts in ((Cluster, _texts()), (Profile, _profiles()), (Plan, _plans())):
        for name, text in texts.items():
            yield kind, name, text


def _high_water_mb() -> float:
    """Return the peak memory of this process since the last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _read(kind: type[Any], text: str) -> dict[str, float]:
    content = text.encode()
    Path("/proc/self/clear_refs").write_text("5")
    before_mb, began_s = _high_water_mb(), time.process_time()
    num_problems = 0
    try:
        read_document(document_pb2.Document(content=content), kind)
    except DocumentError as error:
        num_problems = len(error.problems)
    return {"problems": num_problems, "mb": _high_water_mb() - before_mb, "cpu_s": time.process_time() - began_s}


def _cost() -> None:
    """Read each document in a separate process, limited to little more than is allowed."""
    for kind, name, text in _documents():
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (10 * ceil(MOST_CPU_S), 10 * ceil(MOST_CPU_S)))
            print(json.dumps({"name": name, **_read(kind, text)}), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="NOT CHECKED: memory is measured with Linux")
def test_no_document_of_the_allowed_size_exhausts_the_planner() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.planner.convert.test_costly_documents"], capture_output=True, text=True
    )
    costs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [cost["name"] for cost in costs] == [name for _, name, _ in _documents()], done.stderr
    for cost in costs:
        assert 1 <= cost["problems"] <= 100, cost
        assert cost["mb"] <= MOST_MB, cost
        assert cost["cpu_s"] <= SLACK * MOST_CPU_S, cost


if __name__ == "__main__":
    _cost()
