"""Canonical JSON: equal data have equal bytes, and therefore equal digests."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(data: Any) -> bytes:
    """Return plain data as JSON with sorted keys, no white space and no NaN or infinity."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def content_digest(content: bytes) -> str:
    """Return the digest ``sha256:...`` of bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
