"""Stored answers to requests contain no large documents, since the resource in the answer has them already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import Message

from hetis.planner.store import Transaction
from hetis.v1 import document_pb2

A = TypeVar("A", bound=Message)
MOST_KEPT_BYTES = 4096
_LEFT_OUT = b"\0"  # cannot be a document


def without_documents(answer: A) -> A:
    """Return a copy whose large documents are marked as left out."""
    kept = type(answer)()
    kept.CopyFrom(answer)
    for document in _documents(kept):
        if len(document.content) > MOST_KEPT_BYTES:
            document.content = _LEFT_OUT
        if len(document.text) > MOST_KEPT_BYTES:
            document.text = _LEFT_OUT
    return kept


def with_documents(answer: A, tx: Transaction) -> A:
    """Return the answer with its documents restored, or with empty ones that the resource has no longer."""
    missing = [document for document in _documents(answer) if _LEFT_OUT in (document.content, document.text)]
    if missing:
        known = {document.digest: document for body in _bodies(answer, tx) for document in _documents(body)}
        for document in missing:
            present = known.get(document.digest, document_pb2.Document())
            if document.content == _LEFT_OUT:
                document.content = present.content
            if document.text == _LEFT_OUT:
                document.text = present.text
    return answer


def _bodies(answer: Message, tx: Transaction) -> Iterator[Message]:
    """Yield the stored bodies of the resources in an answer."""
    for field, table in (("cluster", tx.clusters), ("profile", tx.profiles), ("plan", tx.plans)):
        if field in answer.DESCRIPTOR.fields_by_name and answer.HasField(field):
            record = table.get(getattr(answer, field).name)
            if record is not None:
                yield record.body


def _documents(message: Message) -> Iterator[document_pb2.Document]:
    if isinstance(message, document_pb2.Document):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for part in value if field.is_repeated else (value,):
            yield from _documents(part)
