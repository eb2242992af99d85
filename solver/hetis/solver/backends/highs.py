"""The set-up of HiGHS for every use: quiet, on one thread, within a time limit; and programs in its form."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import highspy
import numpy as np

# For linear programs that start with few columns and receive more: a feasible solution remains feasible.
GROWING_SIMPLEX: Mapping[str, str | int | float] = {
    "presolve": "off",
    "solver": "simplex",
    "simplex_strategy": 4,  # primal: columns are added, rows never
    "primal_feasibility_tolerance": 1e-9,
    "dual_feasibility_tolerance": 1e-9,
}
LEAST_S = 0.01  # least time limit given to HiGHS


def quiet_highs(
    options: Mapping[str, str | int | float] | None = None,
    *,
    time_limit_s: float = np.inf,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> Any:
    """Return a HiGHS solver without a model. ``options`` have HiGHS's names; an infinite time limit sets none.

    The limit is in wall time. ``stop`` is polled for an end by other clocks or for other reasons.
    """
    with no_stray_lines():  # HiGHS 1.16 prints its version before any option can turn that off
        highs: Any = _QuietHighs()
        highs.silent()
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("random_seed", seed)
    for option, value in (options or {}).items():
        highs.setOptionValue(option, value)
    if np.isfinite(time_limit_s):
        highs.setOptionValue("time_limit", max(LEAST_S, time_limit_s))
    if stop is not None:

        def interrupt(event: Any) -> None:
            if stop():
                event.interrupt()

        highs.cbMipInterrupt.subscribe(interrupt)
        highs.cbSimplexInterrupt.subscribe(interrupt)
    return highs


def linear_program(
    cost: Any,
    columns: tuple[Any, Any],
    rows: tuple[Any, Any],
    entries: Sequence[tuple[Any, Any, Any]],
    *,
    whole: Any = None,
    maximise: bool = False,
) -> Any:
    """Return a linear or mixed integer program in the form that HiGHS accepts.

    Args:
        cost: cost of every column.
        columns, rows: their lower and upper bounds.
        entries: blocks of (rows, columns, values), each of arrays that are broadcast together; the others are 0.
        whole: whether each column is a whole number; None for a linear program.
    """
    row, column, value = (
        np.concatenate([np.ravel(part) for part in parts])
        for parts in zip(*(np.broadcast_arrays(*block) for block in entries), strict=True)
    )
    by_column = np.argsort(column, kind="stable")
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(cost), len(rows[0])
    lp.sense_ = highspy.ObjSense.kMaximize if maximise else highspy.ObjSense.kMinimize
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = (np.asarray(part, np.float64) for part in (cost, *columns))
    lp.row_lower_, lp.row_upper_ = (np.asarray(part, np.float64) for part in rows)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.searchsorted(column[by_column], np.arange(len(cost) + 1)).astype(np.int32)
    lp.a_matrix_.index_ = row[by_column].astype(np.int32)
    lp.a_matrix_.value_ = value[by_column].astype(np.float64)
    if whole is not None:
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[int(one)] for one in whole]
    return lp


class _QuietHighs(highspy.Highs):  # type: ignore[misc]  # highspy has no types
    """HiGHS that writes nothing to stdout, for which its own options do not suffice."""

    def run(self) -> Any:
        with no_stray_lines():
            return super().run()


@contextmanager
def no_stray_lines() -> Iterator[None]:
    """Discard what C code prints to stdout within the block, but nothing that Python writes there.

    HiGHS 1.12 has a leftover ``printf`` in its MIP search that no option turns off. Only the C library's stream, a
    pointer that all threads share, is redirected. Descriptor 1 stays as it is, because other threads of the caller may
    print or start processes in the meantime, and their output must not be lost. What other C code of the process prints
    by ``printf`` while any thread is in the block is lost; no less harmful way was found. C libraries other than glibc
    do not let their stream be changed: there the line appears.
    """
    stream = _c_stdout()
    if stream is None:
        yield
        return
    stream.enter()
    try:
        yield
    finally:
        stream.leave()


class _Stream:
    """C's ``stdout``, which discards its output while any thread is inside the block."""

    def __init__(self, variable: ctypes.c_void_p, nowhere: int) -> None:
        self._variable, self._nowhere = variable, nowhere
        self._usual = variable.value
        self._num_inside = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._usual, self._variable.value = self._variable.value, self._nowhere
            self._num_inside += 1

    def leave(self) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._variable.value = self._usual

    def forget(self) -> None:
        """Reset as if no thread were inside: in the child of a fork, the other threads no longer exist."""
        self._lock = threading.Lock()
        if self._num_inside > 0:
            self._num_inside, self._variable.value = 0, self._usual


@cache
def _c_stdout() -> _Stream | None:
    try:
        libc = ctypes.CDLL(None)
        variable = ctypes.c_void_p.in_dll(libc, "stdout")
        _ = libc.gnu_get_libc_version  # identifies glibc, whose manual permits setting stdout
    except (OSError, TypeError, ValueError, AttributeError):
        return None
    libc.fopen.restype = ctypes.c_void_p
    nowhere = libc.fopen(os.fsencode(os.devnull), b"we")  # never closed: another thread may be writing to it
    if not nowhere:
        return None
    stream = _Stream(variable, nowhere)
    os.register_at_fork(after_in_child=stream.forget)
    return stream
