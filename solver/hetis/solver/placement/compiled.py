"""The one door to numba: compiled functions, cached on disk, recompiled when any kernel's source changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compiles a function on its first call, without the GIL, and keeps the machine code beside the source.

    numba dates cached code by the function's own file alone, although code of other files is inlined into it; here
    the cache is dated by all kernel files together, so that no stale code survives an edit.
    """
    dispatcher: Any = njit(nogil=True, cache=True)(function)
    dispatcher._cache._cache_file._source_stamp = _stamp()
    return cast(Function, dispatcher)


@cache
def _stamp() -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of every source file of this package."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((file.name, stat.st_mtime_ns, stat.st_size) for file in files for stat in [file.stat()])
