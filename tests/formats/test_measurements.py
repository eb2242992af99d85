"""Measurement files survive a round trip, and every possible error has its message."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.errors import DocumentError
from hetis.formats.measurements import (
    MeasuredBy,
    MeasuredOp,
    Measurements,
    Table,
    load_measurements,
    measurements_to_data,
    parse_measurements,
    save_measurements,
)
from hetis.solver.errors import InvalidProblemError


def transfer(seconds: list[float], *, cold: bool = False) -> Measurements:
    columns = {
        "num_bytes": np.arange(1.0, len(seconds) + 1),
        "path": np.array(["peer"] * len(seconds)),
        "seconds": np.array(seconds),
    }
    return Measurements(
        gpu="L40S",
        provenance=MeasuredBy(tool="a tool", engine="torch", date="2026-01-01"),
        tables=(Table(op=MeasuredOp.TRANSFER, kernel="copy", columns=columns, cold=cold),),
        notes=("shared host",),
    )


DATA = measurements_to_data(transfer([1e-5, 2e-5]))


def changed(*path: str | int, to: object) -> Any:
    data = copy.deepcopy(DATA)
    inner: Any = data
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = to
    return data


@given(st.lists(st.floats(1e-9, 600.0), min_size=1, max_size=20), st.booleans())
def test_a_document_reads_back_as_it_was(seconds: list[float], cold: bool) -> None:
    value = transfer(seconds, cold=cold)
    again = parse_measurements(json.loads(json.dumps(measurements_to_data(value))), "m.json")
    assert measurements_to_data(again) == measurements_to_data(value)
    assert again.tables[0].seconds.tolist() == seconds
    assert again.tables[0].text("path") == ["peer"] * len(seconds)
    assert again.tables[0].cold is cold


@pytest.mark.parametrize("name", ["m.json", "m.json.gz"])
def test_equal_measurements_are_equal_bytes(tmp_path: Path, name: str) -> None:
    save_measurements(tmp_path / name, transfer([1e-5]))
    first = (tmp_path / name).read_bytes()
    save_measurements(tmp_path / name, load_measurements(tmp_path / name))
    assert (tmp_path / name).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [name]


COLUMNS = "tables[0].columns"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "m: holds a list, expected a mapping with apiVersion, kind, ..."),
        (changed("kind", to="Profile"), "m: kind: is 'Profile', expected Measurements"),
        (changed("gpu", to=3), "m: gpu: 3 is not text"),
        (changed("provenance", "tool", to=""), "m: provenance.tool: is missing"),
        (changed("provenance", "engin", to="x"), "m: provenance.engin: unknown field, did you mean engine?"),
        (changed("tables", to=[]), "m: tables: has 0 entries, needs at least 1"),
        (
            changed("tables", 0, "op", to="transfers"),
            "m: tables[0].op: 'transfers' is not one of gemm, layer, prefill_attention, decode_attention, "
            "mixed_attention, all_reduce, transfer, kv_copy, step, e2e, did you mean transfer?",
        ),
        (
            changed("tables", 0, "columns", "seconds", to=[1e-5, -1]),
            f"m: {COLUMNS}.seconds: row 2: is -1, must be > 0",
        ),
        (
            changed("tables", 0, "columns", "seconds", to=[0, 0]),
            f"m: {COLUMNS}.seconds: row 1: is 0, must be > 0 (and 1 more rows)",
        ),
        (
            changed("tables", 0, "columns", "seconds", to=[1e-5, "fast"]),
            f"m: {COLUMNS}.seconds: row 2: is 'fast', expected a number",
        ),
        (
            changed("tables", 0, "columns", "seconds", to=[1e-5, 1e3]),
            f"m: {COLUMNS}.seconds: row 2: is 1000, must be <= 600",
        ),
        (
            changed("tables", 0, "columns", "num_bytes", to=[1.5, 1]),
            f"m: {COLUMNS}.num_bytes: row 1: is 1.5, must be a whole number",
        ),
        (
            changed("tables", 0, "columns", "num_bytes", to=[1, 1e18]),
            f"m: {COLUMNS}.num_bytes: row 2: is 1e+18, must be <= 9.0072e+15",
        ),
        (changed("tables", 0, "columns", "num_bytes", to=[1]), f"m: {COLUMNS}.num_bytes: has 1 rows, seconds has 2"),
        (
            changed("tables", 0, "columns", "path", to=["peer", "pear"]),
            f"m: {COLUMNS}.path: row 2: 'pear' is not one of h2d, d2h, d2d, peer, network, loopback, "
            "did you mean peer?",
        ),
        (
            changed("tables", 0, "columns", "num_byte", to=[1, 2]),
            f"m: {COLUMNS}.num_byte: unknown column, did you mean num_bytes?",
        ),
        (changed("tables", 0, "cold", to="yes"), "m: tables[0].cold: 'yes' is not true or false"),
        (
            changed("tables", 0, "columns", "num_bytes", to=[1, 10**400]),
            f"m: {COLUMNS}.num_bytes: row 2: is 10000000... (401 digits), too large to compute with",
        ),
    ],
)
def test_each_problem_is_named_with_its_place(data: Any, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_measurements(data, "m")
    assert str(caught.value) == message


def test_all_problems_are_told_at_once() -> None:
    data = changed("gpu", to="")
    data["tables"][0]["columns"]["seconds"] = [-1, 1]
    data["tables"][0]["columns"].pop("path")
    with pytest.raises(DocumentError) as caught:
        parse_measurements(data, "m")
    assert [problem.path for problem in caught.value.problems] == [
        "gpu",
        f"{COLUMNS}.path",
        f"{COLUMNS}.seconds",
    ]


def test_another_kind_does_not_hide_other_problems_of_a_document_with_all_fields() -> None:
    data = changed("kind", to="Measurement")
    data["tables"][0]["op"] = "transfers"
    with pytest.raises(DocumentError) as caught:
        parse_measurements(data, "m")
    assert [problem.path for problem in caught.value.problems] == ["kind", "tables[0].op"]
    with pytest.raises(DocumentError) as caught:
        parse_measurements(data | {"fits": []}, "m")
    assert [problem.path for problem in caught.value.problems] == ["kind"]


@pytest.mark.parametrize(
    ("number", "shown"), [("NaN", ".nan"), ("-Infinity", "-.inf"), ("9" * 5000, ".inf"), ("1e999", ".inf")]
)
def test_numbers_that_are_none_are_named_with_column_and_row(number: str, shown: str, tmp_path: Path) -> None:
    text = json.dumps(changed("tables", 0, "columns", "seconds", to=[1e-5, 12345.5])).replace("12345.5", number)
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(DocumentError) as caught:
        load_measurements(tmp_path / "m.json")
    (problem,) = caught.value.problems
    assert problem.path == f"{COLUMNS}.seconds"
    assert problem.message == f"row 2: is {shown}, must be finite"


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(DATA).encode(), mtime=0)
    cut = len(whole) - 20
    cases = {
        "cut.json.gz": (whole[:-20], f"is truncated: its gzip stream ends after {cut} bytes without an end mark"),
        "plain.json.gz": (b"{}", "is not gzip-compressed, though its name ends in .gz"),
        "empty.json": (b"", "is empty"),
        "deep.json": (b"[" * 10_000, "is nested more than 64 levels deep"),
    }
    for name, (raw, expected) in cases.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DocumentError) as caught:
            load_measurements(tmp_path / name)
        assert caught.value.problems[0].message == expected
    with pytest.raises(DocumentError, match="no such file"):
        load_measurements(tmp_path / "none.json")
    with pytest.raises(DocumentError, match="cannot be written: no folder"):
        save_measurements(tmp_path / "none" / "m.json.gz", transfer([1.0]))


def test_a_table_cannot_be_made_wrong() -> None:
    with pytest.raises(InvalidProblemError, match=r"^kv_copy table: seconds: row 1: is nan|must be finite"):
        Table(op=MeasuredOp.KV_COPY, kernel="", columns={"num_bytes": np.ones(1), "seconds": np.array([np.nan])})
