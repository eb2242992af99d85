"""Measurement files: a tool's measurements on one GPU, column by column, before anything is fitted to them.

A file is JSON, gzip-compressed if its name ends in ``.gz``: ``apiVersion: hetis/v1``, ``kind: Measurements``, a
``gpu``, a ``provenance``, ``tables`` of equally long columns, and ``notes``. Units are seconds and bytes throughout.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hetis.formats.errors import did_you_mean, shown, single_problem
from hetis.formats.fields import Document, DocumentPart, Found, Title, entries, mapping
from hetis.formats.files import MAX_BYTES, decoded, file_label, read_bytes, unpacked, write_atomically
from hetis.formats.kinds import kind_of
from hetis.formats.positions import MAX_DEPTH, Text
from hetis.solver.errors import InvalidProblemError

MAX_ROWS = 2_000_000  # limit per table
MAX_SECONDS = 600.0  # limit per call or request; no valid measurement takes this long
MAX_COUNT = 2**53  # beyond it a double is no longer exact
Column = NDArray[np.float64] | NDArray[np.str_]


class MeasuredOp(StrEnum):
    """One table of measurements. Every table has ``seconds`` (median, > 0) and may have ``spread``.

    =====================  ==========================================================================================
    ``gemm``               ``m, n, k``: an (m x k) by (k x n) product; ``weight_bits`` of the (k x n) matrix
    ``layer``              ``model, tp, op, tokens``: one operator of a layer on one rank of ``tp``, attention left
                           out; ``hidden`` size, ``params`` weights it reads (0: elementwise), ``weight_bits``. Rows of
                           equal ``model, tp, tokens`` add up to the layer
    ``prefill_attention``  ``batch`` prompts of ``tokens`` each, over ``past_tokens``; ``query_heads, kv_heads,
                           head_dim`` of the rank
    ``decode_attention``   ``batch`` single tokens over ``context_tokens`` each; heads as above
    ``mixed_attention``    both in one kernel: a chunk of ``tokens`` of one prompt, over ``past_tokens``, and ``batch``
                           single tokens over ``context_tokens`` each; heads as above
    ``all_reduce``         ``num_gpus`` and ``num_bytes`` of the message on each; ``impl`` names the library
    ``transfer``           ``num_bytes`` over ``path``: h2d, d2h, d2d, peer (another GPU), network or loopback
    ``kv_copy``            ``num_bytes`` of KV blocks gathered or scattered
    ``step``               what an engine adds per iteration, by ``batch`` and ``tokens``
    ``e2e``                a whole engine: ``model, tp, batch, prompt_tokens, output_tokens``; ``phase`` is prompt
                           (seconds to the first token) or token (seconds per further token)
    =====================  ==========================================================================================
    """

    GEMM = "gemm"
    LAYER = "layer"
    PREFILL_ATTENTION = "prefill_attention"
    DECODE_ATTENTION = "decode_attention"
    MIXED_ATTENTION = "mixed_attention"
    ALL_REDUCE = "all_reduce"
    TRANSFER = "transfer"
    KV_COPY = "kv_copy"
    STEP = "step"
    E2E = "e2e"


TRANSFER_PATHS = ("h2d", "d2h", "d2d", "peer", "network", "loopback")
_HEADS = {"query_heads": 1, "kv_heads": 1, "head_dim": 1}
# Numeric columns with their minimum values. Text columns are in _TEXT, optional ones in _OPTIONAL.
_NUMBERS: Mapping[MeasuredOp, Mapping[str, float]] = {
    MeasuredOp.GEMM: {"m": 1, "n": 1, "k": 1, "weight_bits": 1},
    MeasuredOp.LAYER: {"tp": 1, "tokens": 1, "hidden": 1, "params": 0, "weight_bits": 1},
    MeasuredOp.PREFILL_ATTENTION: {"batch": 1, "tokens": 1, "past_tokens": 0, **_HEADS},
    MeasuredOp.DECODE_ATTENTION: {"batch": 1, "context_tokens": 1, **_HEADS},
    MeasuredOp.MIXED_ATTENTION: {"tokens": 1, "past_tokens": 0, "batch": 1, "context_tokens": 1, **_HEADS},
    MeasuredOp.ALL_REDUCE: {"num_gpus": 2, "num_bytes": 1},
    MeasuredOp.TRANSFER: {"num_bytes": 1},
    MeasuredOp.KV_COPY: {"num_bytes": 1},
    MeasuredOp.STEP: {"batch": 1, "tokens": 0},
    MeasuredOp.E2E: {"tp": 1, "batch": 1, "prompt_tokens": 1, "output_tokens": 1},
}
_TEXT: Mapping[MeasuredOp, tuple[str, ...]] = {
    MeasuredOp.LAYER: ("model", "op"),
    MeasuredOp.ALL_REDUCE: ("impl",),
    MeasuredOp.TRANSFER: ("path",),
    MeasuredOp.E2E: ("model", "phase"),
}
_COUNTS = {name for numbers in _NUMBERS.values() for name in numbers} - {"params"}  # a product may exceed MAX_COUNT
_OPTIONAL = ("spread", "impl")
_CHOICES = {"path": TRANSFER_PATHS, "phase": ("prompt", "token")}


class MeasuredBy(DocumentPart):
    """The measuring tool and its environment. Fields are empty if the source does not say."""

    tool: str  # what called the kernels: ``hetis-profile 0.1.0``, ``aiconfigurator-core 0.12.0``
    engine: str = ""  # engine whose kernels were called: ``vLLM``, ``torch``
    engine_version: str = ""
    source: str = ""  # files or an address from which the figures were read
    licence: str = ""
    host: str = ""
    date: str = ""

    def __str__(self) -> str:
        engine = " ".join(part for part in (self.engine, self.engine_version) if part)
        licence = f" ({self.licence})" if self.licence else ""
        return f"{self.tool}{licence}" + (f", {engine}" if engine else "")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Rows of one operator by one kernel. ``columns`` are as in `MeasuredOp`, all of one length. Raises
    InvalidProblemError if a column is missing, unknown, of another length, or holds a value out of its range. The
    message names column and row (from 1).
    """

    op: MeasuredOp
    kernel: str
    columns: Mapping[str, Column]
    # Whether the last-level cache was flushed between samples, as reading the other layers does in serving. Without it
    # a fit omits the rows that a cache may have served.
    cold: bool = False

    def __post_init__(self) -> None:
        problems = list(_table_problems(self.op, self.columns))
        if problems:
            raise InvalidProblemError("; ".join(f"{self.op} table: {place}: {text}" for place, text in problems[:20]))

    def __len__(self) -> int:
        return len(self.columns["seconds"])

    @property
    def seconds(self) -> NDArray[np.float64]:
        return self.numbers("seconds")

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Return a numeric column."""
        column: NDArray[np.float64] = np.asarray(self.columns[name], dtype=np.float64)
        return column

    def text(self, name: str) -> list[str]:
        """Return a text column."""
        return [str(value) for value in self.columns[name]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurements:
    """The whole content of one file."""

    gpu: str  # name in the GPU catalogue
    provenance: MeasuredBy
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.gpu or not self.provenance.tool:
            raise InvalidProblemError("measurements need the names of a GPU and of a tool")
        if not self.tables:
            raise InvalidProblemError(f"measurements of {self.gpu} hold no tables")


def load_measurements(path: str | os.PathLike[str]) -> Measurements:
    """Return the measurements in a file. Raises DocumentError if the file is unreadable, truncated, not JSON, or not
    measurements; with every problem (for each column the first wrong row and the number of others).
    """
    label = file_label(path)
    raw = unpacked(read_bytes(path, most=MAX_BYTES), label, most=4 * MAX_BYTES)
    return parse_measurements(_json(decoded(raw, label), label), label)


def save_measurements(path: str | os.PathLike[str], value: Measurements) -> None:
    """Write the whole file or nothing; equal measurements give equal bytes. Raises DocumentError if it cannot."""
    text = json.dumps(measurements_to_data(value), ensure_ascii=False, separators=(",", ":")) + "\n"
    write_atomically(path, gzip.compress(text.encode(), mtime=0) if os.fspath(path).endswith(".gz") else text)


class TablePart(DocumentPart):
    """Rows of one operator by one kernel; with ``cold`` the last-level cache was flushed between samples."""

    op: Annotated[MeasuredOp, Field(strict=False)]
    kernel: str = ""
    cold: bool = False
    columns: dict[str, list[Any]]


class MeasurementsDocument(Document):
    """A tool's measurements on one GPU."""

    kind: Literal["Measurements"]
    gpu: Title
    provenance: MeasuredBy
    tables: Annotated[list[TablePart], Field(min_length=1)]
    notes: list[str] = Field(default_factory=list)


def _to_measurements(document: MeasurementsDocument) -> Measurements:
    tables = (
        Table(op=part.op, kernel=part.kernel, cold=part.cold, columns=_arrays(part.columns)) for part in document.tables
    )
    return Measurements(
        gpu=document.gpu, provenance=document.provenance, tables=tuple(tables), notes=tuple(document.notes)
    )


def _measurements_data(value: Measurements) -> dict[str, Any]:
    return {
        "gpu": value.gpu,
        "provenance": value.provenance.model_dump(exclude_defaults=True),
        "tables": [
            {
                "op": table.op.value,
                "kernel": table.kernel,
                **({"cold": True} if table.cold else {}),
                "columns": {name: [_plain(v) for v in column.tolist()] for name, column in table.columns.items()},
            }
            for table in value.tables
        ],
        "notes": list(value.notes),
    }


def _plain(value: float | str) -> float | int | str:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _json(text: str, label: str) -> Any:
    try:
        try:
            return json.loads(text)  # with NaN and Infinity, which are no JSON, to be refused with column and row
        except json.JSONDecodeError:
            raise
        except ValueError:  # a whole number of thousands of digits
            return json.loads(text, parse_int=float)
    except json.JSONDecodeError as error:
        what = "is empty" if not text.strip() else f"is not JSON: {error.msg}"
        raise single_problem(label, what, line=error.lineno, column=error.colno) from None
    except RecursionError:
        raise single_problem(label, f"is nested more than {MAX_DEPTH} levels deep") from None


def _check(data: Mapping[str, Any]) -> Found:
    """Yield problems with the columns of tables, for each column the first wrong row; and an empty name of the tool."""
    if mapping(data.get("provenance")).get("tool") == "":
        yield ("provenance", "tool"), "is missing"
    for i, table in entries(data.get("tables")):
        op, columns = table.get("op"), table.get("columns")
        if op not in [known.value for known in MeasuredOp] or not isinstance(columns, dict):
            continue
        if all(isinstance(column, list) for column in columns.values()):
            for name, message in _column_problems(MeasuredOp(op), columns):
                yield ("tables", i, "columns", *name), message


def _column_problems(op: MeasuredOp, columns: Mapping[str, list[Any]]) -> Iterator[tuple[tuple[str, ...], str]]:
    wrong = False
    for name, column in columns.items():
        expected = str if name in _TEXT.get(op, ()) else (int, float)
        for row, value in enumerate(column, start=1):
            if not isinstance(value, expected) or isinstance(value, bool):
                wrong = True
                kind = "text" if expected is str else "a number"
                yield (name,), f"row {row}: is {shown(value)}, expected {kind}"
                break
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                wrong = True
                yield (name,), f"row {row}: is {_shown_digits(value)}, too large to compute with"
                break
    if not wrong:
        for name, message in _table_problems(op, _arrays(columns)):
            yield (name,), message


def _shown_digits(value: int) -> str:
    """Return a number of hundreds of digits, shortened."""
    digits = str(value)
    return f"{digits[:8]}... ({len(digits.lstrip('-'))} digits)"


def _arrays(columns: Mapping[str, list[Any]]) -> dict[str, Column]:
    texts = {name for name, column in columns.items() if column and isinstance(column[0], str)}
    numbers: dict[str, Column] = {n: np.array(column, np.float64) for n, column in columns.items() if n not in texts}
    return {name: np.array(columns[name], np.str_) if name in texts else numbers[name] for name in columns}


def _table_problems(op: MeasuredOp, columns: Mapping[str, Column]) -> Iterator[tuple[str, str]]:
    """Yield (column, problem), for each column the first wrong row and the number of others."""
    numbers = {**_NUMBERS[op], "seconds": 0.0, "spread": 0.0}
    wanted = (*_TEXT.get(op, ()), *numbers)
    needed = [name for name in wanted if name not in _OPTIONAL]
    has = f"a table of {op} has {', '.join(needed)}"
    yield from ((name, f"is missing; {has}") for name in needed if name not in columns)
    for name in columns:
        if name not in wanted:
            yield name, f"unknown column{did_you_mean(name, wanted)}"
    if "seconds" not in columns:
        return
    rows = len(columns["seconds"])
    if not 1 <= rows <= MAX_ROWS:
        yield "seconds", f"has {rows} rows, needs 1 to {MAX_ROWS}"
    for name, column in columns.items():
        if name not in wanted:
            continue
        if column.ndim != 1 or len(column) != rows:
            yield name, f"has {len(column)} rows, seconds has {rows}"
        elif name in numbers:
            if column.dtype.kind not in "fiu":
                yield name, "is text, expected numbers"
            elif len(column):
                yield from _number_problems(name, np.asarray(column, dtype=np.float64), numbers[name])
        elif name in _CHOICES:
            known = _CHOICES[name]
            if wrong := [row for row, value in enumerate(column, start=1) if str(value) not in known]:
                value = str(column[wrong[0] - 1])
                hint = f"{', '.join(known)}{did_you_mean(value, known)}{_more(len(wrong))}"
                yield name, f"row {wrong[0]}: {value!r} is not one of {hint}"


def _number_problems(name: str, column: NDArray[np.float64], least: float) -> Iterator[tuple[str, str]]:
    finite = np.isfinite(column)
    if not finite.all():
        row = int(np.argmin(finite))
        value, others = shown(float(column[row])), _more(int((~finite).sum()))
        yield name, f"row {row + 1}: is {value}, must be finite{others}"
        return
    low, limit = (column <= 0, "> 0") if name == "seconds" else (column < least, f">= {least:g}")
    most = MAX_SECONDS if name == "seconds" else MAX_COUNT if name in _COUNTS else math.inf
    broken = (column != np.floor(column)) & (name in _COUNTS)
    for wrong, needed in ((low, limit), (column > most, f"<= {most:g}"), (broken, "a whole number")):
        if wrong.any():
            row = int(np.argmax(wrong))
            yield name, f"row {row + 1}: is {column[row]:g}, must be {needed}{_more(int(wrong.sum()))}"


def _more(count: int) -> str:
    return f" (and {count - 1} more rows)" if count > 1 else ""


MEASUREMENTS = kind_of(
    MeasurementsDocument, Measurements, to_value=_to_measurements, to_data=_measurements_data, check=_check
)
measurements_to_data = MEASUREMENTS.to_data


def parse_measurements(data: Any, file: str) -> Measurements:
    """Return the measurements in a document's plain data. Raises DocumentError with every problem of the document."""
    return MEASUREMENTS.parse(data, Text(file=file, text=None))
