"""Answers of HTTP servers, read within a size and a time."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

_PIECE_BYTES = 64 * 2**10
Opened = Callable[..., Any]  # `urllib.request.urlopen`, or an opener's `open`


def metrics_body(url: str, *, timeout_s: float, max_bytes: int, opened: Opened) -> bytes | None:
    """Return the body of a ``/metrics`` answer, or None if it is larger than ``max_bytes``.

    The time limit applies to the whole body, not to each read.

    Raises:
        OSError, ValueError, http.client.HTTPException: there is no answer, or none in time. Say which with `reason_of`.
    """
    ends_s = time.monotonic() + timeout_s
    request = urllib.request.Request(url, headers={"Accept": "text/plain; version=0.0.4"})
    pieces: list[bytes] = []
    size = 0
    with opened(request, timeout=timeout_s) as response:
        while piece := response.read1(_PIECE_BYTES):
            size += len(piece)
            if size > max_bytes:
                return None
            pieces.append(piece)
            if time.monotonic() > ends_s:
                raise TimeoutError(f"no whole answer within {timeout_s:g} s")
    return b"".join(pieces)


def reason_of(error: Exception) -> str:
    """Return why there was no answer."""
    # urllib.error.URLError is an OSError whose reason says more than the error itself.
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason) or type(reason).__name__
