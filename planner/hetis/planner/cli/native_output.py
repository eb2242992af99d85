"""Suppression of native libraries' output on stdout, which is for data alone.

HiGHS 1.12 prints a line from inside its MIP search whatever its options are; it writes to the process's file
descriptor, which Python's own `sys.stdout` cannot intercept.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_STDOUT = 1


@contextmanager
def no_native_output() -> Iterator[None]:
    """Drop what is written to file descriptor 1 in the block, which must therefore print no data."""
    try:
        kept = os.dup(_STDOUT)
    except OSError:  # closed by the parent process: there is nothing to keep clean
        yield
        return
    sys.stdout.flush()
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDOUT)
        os.close(nowhere)
        yield
    finally:
        _flush_c_streams()
        os.dup2(kept, _STDOUT)
        os.close(kept)


def _flush_c_streams() -> None:
    """Flush C's buffers before the descriptor changes; do nothing without a C library."""
    try:
        ctypes.CDLL(None).fflush(None)
    except (OSError, TypeError, AttributeError):
        return
