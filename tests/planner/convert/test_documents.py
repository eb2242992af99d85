"""Documents of requests: read with all their problems, answered in canonical JSON."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.errors import DocumentError
from hetis.planner.convert import documents
from hetis.planner.convert.names import CLUSTER, NODE, cluster_of, is_id, last_part, node_name, timestamp
from hetis.solver.cluster import Cluster
from hetis.v1 import document_pb2

FLEET = """\
apiVersion: hetis/v1
kind: Cluster
name: {name}
nodes: [{{name: l4, count: 3, gpus: [{{type: L4, count: 2}}]}}]
network: {{bandwidth: 100Gbps, latency: 20us}}
"""


@given(name=st.sampled_from(["a", "fleet of two", "Größe"]), source=st.sampled_from(["", "fleet.yaml"]))
def test_canonical_json_reads_as_itself(name: str, source: str) -> None:
    given_text = document_pb2.Document(content=FLEET.format(name=name).encode(), source_name=source)
    canonical = documents.document_of(documents.read_document(given_text, Cluster), source_name=source)
    assert canonical.kind == document_pb2.DOCUMENT_KIND_CLUSTER
    assert canonical.digest == f"sha256:{hashlib.sha256(canonical.content).hexdigest()}"
    again = documents.document_of(documents.read_document(canonical, Cluster), source_name=source)
    assert again == canonical


def test_what_grows_too_large_as_json_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML aliases expand to much more than their text."""
    monkeypatch.setattr(documents, "MAX_BYTES", 5000)
    types = "".join(f"  X{number}: *t\n" for number in range(40))
    text = (
        FLEET.format(name="big")
        + "gpu_types:\n  X: &t {memory: 24GiB, memory_bandwidth: 300GB/s, fp16: 121TFLOPS, architecture: "
        + "A" * 200
        + "}\n"
        + types
    )
    assert len(text) < documents.MAX_BYTES / 3
    value = documents.read_document(document_pb2.Document(content=text.encode()), Cluster)
    with pytest.raises(DocumentError, match=r"document: has \d+ bytes as canonical JSON, at most 5000 are allowed"):
        documents.document_of(value)


@pytest.mark.parametrize("source", ["x" * 256, "a\nb"])
def test_names_of_sources_are_short_and_printable(source: str) -> None:
    with pytest.raises(DocumentError, match="source_name"):
        documents.read_document(document_pb2.Document(content=b"{}", source_name=source), Cluster)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        *(("a", True), ("a-b", True), ("0", True), ("a" * 63, True)),
        *(("", False), ("-a", False), ("a-", False), ("A", False), ("a_b", False), ("a" * 64, False), ("a\n", False)),
    ],
)
def test_ids_are_short_and_plain(text: str, is_one: bool) -> None:
    assert is_id(text) == is_one
    assert CLUSTER.matches(f"clusters/{text}") == is_one


def test_names_are_made_and_taken_apart() -> None:
    name = node_name("clusters/night", "l4-3")
    assert NODE.matches(name)
    assert (cluster_of(name), last_part(name)) == ("clusters/night", "l4-3")
    assert not NODE.matches("clusters/night/nodes/a/b")
    assert not NODE.matches("clusters/night/nodes/")


@given(time_s=st.floats(0, 4e9))
def test_moments_keep_their_microsecond(time_s: float) -> None:
    assert abs(timestamp(time_s).ToNanoseconds() / 1e9 - time_s) <= 2e-6
