"""Any document of the allowed size costs at most 300 MB, and seconds, not minutes; also one made to cost much."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

from hetis.formats.errors import DocumentError
from hetis.planner.convert.clusters import cluster_document
from hetis.v1 import document_pb2

MOST_MB = 300
MOST_CPU_S = 100  # of all of them together; some took that alone
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


def _cost() -> None:
    """Reads them all, each named when it was refused; kept from more memory and time than is allowed."""
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S))
    for name, text in _texts().items():
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            cluster_document(document_pb2.Document(content=text.encode()))
            num_problems = 0
        except DocumentError as error:
            num_problems = len(error.problems)
        grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        cost = {"name": name, "problems": num_problems, "mb": grown_mb, "cpu_s": time.process_time() - began}
        print(json.dumps(cost), flush=True)


def test_no_document_of_the_allowed_size_exhausts_the_planner() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.planner.convert.test_costly_documents"], capture_output=True, text=True
    )
    costs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [cost["name"] for cost in costs] == list(_texts()), done.stderr
    for cost in costs:
        assert 1 <= cost["problems"] <= 100, cost
        assert cost["mb"] <= MOST_MB, cost


if __name__ == "__main__":
    _cost()
