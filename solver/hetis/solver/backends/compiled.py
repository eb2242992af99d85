"""Compilation by numba: functions cached on disk and recompiled if any kernel of their package changes."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from numba import config, njit
from numba.core.compiler_lock import global_compiler_lock
from numba.core.types import unliteral
from numba.np import linalg as numba_linalg

from hetis.solver.backends.search_clock import compiling

Function = TypeVar("Function", bound=Callable[..., Any])


def _check_scipy() -> None:
    """Stand in for numba's `ensure_blas`, which imports ``scipy.linalg`` to see whether it exists: 0.34 s of CPU.

    Raises:
        ImportError: scipy is not installed, as `ensure_blas` raises it.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("scipy is required for linear algebra")


@contextmanager
def _unimported_scipy() -> Iterator[None]:
    """Import numba's array functions without scipy, which no kernel of ours calls.

    They check for BLAS once, on import. Code that uses BLAS still calls the real check when it is compiled.
    """
    ensure_blas = numba_linalg.ensure_blas
    numba_linalg.ensure_blas = _check_scipy
    try:
        yield
    finally:
        numba_linalg.ensure_blas = ensure_blas


with _unimported_scipy():
    _array_functions: Any = importlib.import_module("numba.np.arraymath")
_array_functions.ensure_blas = numba_linalg.ensure_blas

LONGEST_WAIT_S = 600.0  # limit on the wait for another process that compiles, which may have been suspended


def kernel_of(*folders: Path, fastmath: bool | set[str] = False) -> Callable[[Function], Function]:
    """Return the decorator for kernels of the package in the first of ``folders``, which may call the others' kernels.

    The decorator compiles a function on its first call, without the GIL, and keeps the machine code beside the source.
    numba validates cached code against the function's own file alone, although code of other files is inlined into it.
    Here the cache is validated against all files of the folders with kernels or their data types, so no stale code
    survives an edit. Compiling takes up to a minute, and a planner, its agents and engines often start at once, so one
    process compiles a package's kernels while the others wait and load the result.

    numba would compile a function and everything below it again for each constant that a caller passes
    (``put(..., 1)`` and ``put(..., -1)``); here it is compiled for the constant's type. No kernel is passed on as a C
    function.
    """

    def kernel(function: Function) -> Function:
        if _is_plain():  # NUMBA_DISABLE_JIT=1: plain Python, for debugging or for trying many changes of the code
            return function
        compiled: Any = njit  # its type stubs lack `no_cfunc_wrapper`
        options = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": fastmath, "no_cfunc_wrapper": True}
        dispatcher: Any = compiled(**options)(function)
        cache_file = dispatcher._cache._cache_file
        cache_file._source_stamp = _stamp(folders)
        cache_file._load_index = partial(_index_of, cache_file._load_index)
        cache_file._load_data = partial(_data_of, cache_file._load_data)
        dispatcher._cache.save_overload = partial(_save_if_possible, dispatcher._cache.save_overload)
        load_or_compile = dispatcher.compile

        def compile_once(signature: Any) -> Any:
            with compiling(), _one_process(Path(dispatcher._cache.cache_path) / "kernels.lock"):
                return load_or_compile(tuple(_type_of(argument) for argument in signature))

        dispatcher.compile = compile_once
        return cast(Function, dispatcher)

    return kernel


# Raised while pickled data are read that name what was removed or renamed, or that a crash of the machine cut off.
_UNREADABLE = (
    *(AttributeError, EOFError, ImportError, IndexError, KeyError, TypeError, ValueError),
    pickle.UnpicklingError,
)


def _index_of(load: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
    """Return the index of cached code from ``load``, or an empty one if it cannot be read.

    numba reads the types of an index before it compares its stamp.
    """
    try:
        return load()
    except (OSError, *_UNREADABLE):
        return {}


def _data_of(load: Callable[[str], Any], name: str) -> Any:
    """Return cached code from ``load``. Raises OSError if it cannot be read: numba then compiles anew."""
    try:
        return load(name)
    except _UNREADABLE as error:
        raise OSError(f"cached code {name} cannot be read: {error}") from error


def _save_if_possible(save: Callable[[Any, Any], None], signature: Any, code: Any) -> None:
    """Save compiled code; on a full disk it is used without, and the next process compiles again."""
    with suppress(OSError):
        save(signature, code)


def _is_plain() -> bool:
    """Return whether compilation by numba is disabled; its type stubs lack the setting."""
    return bool(getattr(config, "DISABLE_JIT", 0))


def _type_of(argument: Any) -> Any:
    """Return ``int64`` for the constant 1, and other types unchanged."""
    return unliteral(argument)  # type: ignore[no-untyped-call, unused-ignore]


def is_cached(function: Callable[..., Any]) -> bool:
    """Return whether a kernel's machine code is on disk, for any types, so that calling it needs no compilation."""
    kernel: Any = function
    return _is_plain() or bool(kernel._cache._cache_file._load_index())


_held: set[Path] = set()  # locks held by this process, since compiling a kernel compiles those that it calls


@contextmanager
def _one_process(lock: Path) -> Iterator[None]:
    """Admit one process of the machine at a time; if locking is impossible or takes too long, each compiles for itself.

    numba's own lock is taken first, because threads that took the two in different orders would deadlock.
    """
    with global_compiler_lock:
        if lock in _held:
            yield
            return
        with _opened(lock) as file:
            if file is not None:
                _wait_for(file)
            _held.add(lock)
            try:
                yield
            finally:
                _held.discard(lock)


def _opened(lock: Path) -> AbstractContextManager[IO[bytes] | None]:
    """Return the file whose lock ends when it is closed or the process dies, or None if it cannot be created."""
    try:
        return lock.open("ab")
    except OSError:
        return nullcontext()


def _wait_for(file: IO[bytes]) -> None:
    """Wait until no other process holds the lock, at most `LONGEST_WAIT_S`; without file locks, do not wait."""
    until_s = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < until_s:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return
        else:
            return


@cache
def _stamp(folders: tuple[Path, ...]) -> tuple[tuple[str, int, int], ...]:
    """Return name, time and size of every source file in ``folders`` that is relevant to kernels."""
    texts = {file: file.read_text() for folder in folders for file in sorted(folder.glob("*.py"))}
    concerned = [file for file, text in texts.items() if "kernel" in text or "NamedTuple" in text]
    return tuple((file.name, stat.st_mtime_ns, stat.st_size) for file in concerned for stat in [file.stat()])
