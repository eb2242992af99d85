"""The door to numba: compiled functions, cached on disk, recompiled when any kernel of their package changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel_of(*folders: Path, fastmath: bool | set[str] = False) -> Callable[[Function], Function]:
    """The decorator for kernels of the package in the first of ``folders``, which may call kernels of the others.

    It compiles a function on its first call, without the GIL, and keeps the machine code beside the source. numba
    dates cached code by the function's own file alone, although code of other files is inlined into it; here the cache
    is dated by all files of the folders that hold kernels or what they work on, so that no stale code survives an edit.
    """

    def kernel(function: Function) -> Function:
        dispatcher: Any = njit(nogil=True, cache=True, error_model="numpy", fastmath=fastmath)(function)
        dispatcher._cache._cache_file._source_stamp = _stamp(folders)
        return cast(Function, dispatcher)

    return kernel


def is_cached(function: Callable[..., Any]) -> bool:
    """Whether a kernel's machine code is on disk, for whatever types: calling it costs no compilation then."""
    kernel: Any = function
    return bool(kernel._cache._cache_file._load_index())


@cache
def _stamp(folders: tuple[Path, ...]) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of every source file in ``folders`` that has to do with kernels."""
    texts = {file: file.read_text() for folder in folders for file in sorted(folder.glob("*.py"))}
    concerned = [file for file, text in texts.items() if "kernel" in text or "NamedTuple" in text]
    return tuple((file.name, stat.st_mtime_ns, stat.st_size) for file in concerned for stat in [file.stat()])
