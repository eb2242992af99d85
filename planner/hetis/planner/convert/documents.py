"""Documents in requests and answers: text written by users in, canonical JSON out."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from hetis.formats import documents
from hetis.formats.cluster import CLUSTER
from hetis.formats.dispatch.dispatch_state import DISPATCH_STATE
from hetis.formats.dispatch.new_requests import DISPATCH_REQUESTS, NewRequests
from hetis.formats.dispatch.saved_state import SavedState
from hetis.formats.errors import DocumentError, single_problem
from hetis.formats.files import canonical_json, content_digest
from hetis.formats.models.document import MODEL_SPEC
from hetis.formats.plan import PLAN
from hetis.formats.positions import Bounds, parse_text
from hetis.formats.profile import PROFILE
from hetis.formats.workload import WORKLOAD
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.store import ClusterRecord
from hetis.planner.threads import run_in_thread_gc_paused, stop_if_unwanted
from hetis.solver.cluster import Cluster
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan
from hetis.solver.profile import Profile
from hetis.solver.workload import Workload
from hetis.v1 import document_pb2

MAX_BYTES = 3 * 2**20
MAX_VALUES, MAX_YAML_VALUES = 400_000, 100_000
"""The most values in a document, which takes at most 2 s and 300 MB to read. A cluster of 10,000 nodes, each with a
name and its GPUs, has 60,000.
"""
MAX_NODES = 10_000  # per cluster: extrapolated from 3,000 measured agents in one process (docs/benchmarks.md)
_MOST_IN_ANSWER = 3_670_016  # bytes of content and text; messages have at most 4 MiB
MAX_SOURCE_NAME = 255
V = TypeVar("V", Cluster, ModelSpec, Workload, Profile, Plan, SavedState, NewRequests)
_KINDS = {
    kind.value: kind for kind in (CLUSTER, MODEL_SPEC, WORKLOAD, PROFILE, PLAN, DISPATCH_STATE, DISPATCH_REQUESTS)
}
_NUMBERS: Mapping[str, document_pb2.DocumentKind.ValueType] = {  # ``ModelSpec``: DOCUMENT_KIND_MODEL_SPEC
    kind.name: document_pb2.DocumentKind.Value("DOCUMENT_KIND" + re.sub("([A-Z])", r"_\1", kind.name).upper())
    for kind in _KINDS.values()
}


def read_document(document: document_pb2.Document, kind: type[V]) -> V:
    """Return the value of a request's document, which must be of ``kind``.

    Slow for large documents, so not for an event loop. Raises DocumentError with every problem of the document.
    """
    label = document.source_name or "document"
    if len(document.source_name) > MAX_SOURCE_NAME:
        label = f"{label[:20]}..."
        raise single_problem(label, f"source_name has {len(document.source_name)} characters, at most 255 are allowed")
    if not label.isprintable():
        raise single_problem("document", "source_name holds characters that cannot be printed")
    expected = _KINDS[kind]
    if document.kind not in (document_pb2.DOCUMENT_KIND_UNSPECIFIED, _NUMBERS[expected.name]):
        given = next((name for name, number in _NUMBERS.items() if number == document.kind), str(document.kind))
        raise single_problem(label, f"kind is {given}, expected {expected.name}")
    bounds = Bounds(max_values=MAX_VALUES, max_yaml_values=MAX_YAML_VALUES, look_up=stop_if_unwanted)
    data, source = parse_text(_text_of(document.content, label), label, bounds)
    nodes = data.get("nodes") if kind is Cluster and isinstance(data, dict) else None
    if isinstance(nodes, list) and len(nodes) > MAX_NODES:
        message = f"has {len(nodes)} entries, a cluster of the service has at most {MAX_NODES} nodes"
        raise DocumentError([source.problem(("nodes",), message)])
    if kind is Workload and isinstance(data, dict) and data.get("trace") is not None:
        # The path would refer to a file of this machine, which no caller may read.
        raise DocumentError([source.problem(("trace",), "a trace cannot be sent: send its histogram")])
    value = expected.parse(data, source)
    assert isinstance(value, kind)
    return value


def canonical_document(source: document_pb2.Document, kind: type[V]) -> tuple[document_pb2.Document, V]:
    """Return the canonical form of a request's document, and its value. Raises as `read_document` does."""
    value = read_document(source, kind)
    return document_of(value, source_name=source.source_name, text=source.content), value


def document_of(value: documents.Value, *, source_name: str = "", text: bytes = b"") -> document_pb2.Document:
    """Return a value as a document: canonical JSON, self-contained, so that the digest covers the content.

    ``text`` is the source that the value was read from, which is stored beside it with its comments. Raises
    DocumentError if it is too large: YAML aliases may expand to much more than their text.
    """
    document = document_from_data(
        documents.to_data(value, self_contained=True), documents.kind_of(value), source_name=source_name
    )
    if len(document.content) > MAX_BYTES:
        label = source_name or "document"
        raise single_problem(
            label, f"has {len(document.content)} bytes as canonical JSON, at most {MAX_BYTES} are allowed"
        )
    if text != document.content and len(text) + len(document.content) <= _MOST_IN_ANSWER:
        document.text = text
    return document


def document_from_data(data: Mapping[str, Any], kind: str, *, source_name: str = "") -> document_pb2.Document:
    """Return plain data that is known to be valid as a document."""
    content = canonical_json(data)
    return document_pb2.Document(
        kind=_NUMBERS[kind], content=content, source_name=source_name, digest=content_digest(content)
    )


def _text_of(content: bytes, label: str) -> str:
    if len(content) > MAX_BYTES:
        raise single_problem(label, f"has {len(content)} bytes, at most {MAX_BYTES} are allowed")
    if not content:
        raise single_problem(label, "is empty")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise single_problem(label, f"is not UTF-8 text (byte {content[error.start]:#04x} at {error.start})") from None
    if "\0" in text:
        raise single_problem(label, f"is not text: it holds a zero byte at offset {text.index(chr(0))}")
    return text


_KEPT_NODES = 100 * MAX_NODES  # in all parsed clusters together; a node takes about 80 bytes


class Declared:
    """A cluster's parsed document, and the ids of its nodes in order. Slow to construct for a large fleet."""

    def __init__(self, value: Cluster) -> None:
        self.value = value
        groups = value.node_groups
        self.nodes: Sequence[str] = sorted(group.node_name(index) for group in groups for index in range(group.count))

    def __contains__(self, node: str) -> bool:
        place = bisect_left(self.nodes, node)
        return place < len(self.nodes) and self.nodes[place] == node


class DeclaredFleets:
    """The clusters used most recently, by digest; a new document has a new digest, so entries never become stale."""

    def __init__(self) -> None:
        self._by_digest: OrderedDict[str, Declared] = OrderedDict()
        self._num_nodes = 0  # in all of them

    async def of(self, record: ClusterRecord) -> Declared:
        """Return the declared cluster of a record, parsing its document in a thread if necessary.

        Raises STORE_UNAVAILABLE if this version cannot read the document.
        """
        digest = record.body.document.digest
        if digest not in self._by_digest:
            await self.read([record])
        self._by_digest.move_to_end(digest)
        return self._by_digest[digest]

    async def read(self, records: Iterable[ClusterRecord]) -> None:
        """Parse the documents of these records that are not known yet, in one thread. Raises as `of` does."""
        unknown = {one.body.document.digest: one for one in records if one.body.document.digest not in self._by_digest}
        if not unknown:
            return
        found = await run_in_thread_gc_paused(lambda: {digest: _read(record) for digest, record in unknown.items()})
        for digest, declared in found.items():
            self._num_nodes += len(declared.nodes) if digest not in self._by_digest else 0
            self._by_digest.setdefault(digest, declared)
        while self._num_nodes > _KEPT_NODES and len(self._by_digest) > 1:
            self._num_nodes -= len(self._by_digest.popitem(last=False)[1].nodes)


def of_another_version(error: DocumentError) -> str:
    """Return who wrote a stored document that this version cannot read, and what it cannot read."""
    return f"another version of hetis, and this one cannot read it: {'; '.join(map(str, error.problems))}"


def _read(record: ClusterRecord) -> Declared:
    try:
        return Declared(read_document(record.body.document, Cluster))
    except DocumentError as error:
        raise ServiceError(
            Reason.ERROR_REASON_STORE_UNAVAILABLE,
            f"{record.name} was stored by {of_another_version(error)}. Nothing was changed; start that version, and "
            "apply a cluster without this",
            metadata={"changed": "no"},
        ) from None
