"""Files as documents in calls. They are sent unchanged: the planner parses and checks them."""

from __future__ import annotations

import os
from collections.abc import Iterable

from hetis.formats.files import file_label, read_text
from hetis.v1 import document_pb2, plan_service_pb2

_MAX_NAME = 255


def document_of_file(path: str | os.PathLike[str], kind: document_pb2.DocumentKind.ValueType) -> document_pb2.Document:
    """Return the document in a file; ``-`` is standard input.

    Raises:
        DocumentError: the file cannot be read.
    """
    return document_pb2.Document(
        kind=kind, content=read_text(path).encode("utf-8"), source_name=file_label(path)[-_MAX_NAME:]
    )


def joined(pieces: Iterable[plan_service_pb2.ReadPlanDocumentResponse]) -> bytes:
    """Return a document from its pieces, given in order."""
    return b"".join(piece.content for piece in pieces)
