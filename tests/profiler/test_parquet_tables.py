"""Parquet tables in the form of aiconfigurator's own: the same result as from text, and clear errors. Needs pyarrow."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.measurements import load_measurements, measurements_to_data
from tests.profiler.command_line import invoke
from tests.profiler.small_tables import OWN_ATTENTION, SMALL_TABLES
from tools.simulator_tables import import_tables

pa: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")


def typed(text: str) -> Any:
    """Return the table of a CSV text with columns of integers, numbers, flags and text, as pandas would write it."""
    header, *rows = csv.reader(io.StringIO(text))
    columns = {}
    for name, values in zip(header, zip(*rows, strict=True), strict=True):
        columns[name] = pa.array([value_of(value) for value in values])
    return pa.table(columns)


def value_of(text: str) -> object:
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def written(path: Path, table: Any) -> Path:
    parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("form", "text"),
    [pytest.param(form, text, id=f"{form}: {name}") for form, name, text in SMALL_TABLES if name != "experts"],
)
def test_parquet_gives_what_text_gives(form: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(text)
    from_text = import_tables(form, [tmp_path / "table.csv"])
    from_parquet = import_tables(form, [written(tmp_path / "table.parquet", typed(text))])
    assert list(map(measurements_to_data, from_parquet)) == list(map(measurements_to_data, from_text))


def test_the_command_imports_a_parquet_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = written(tmp_path / "generation_attention_perf.parquet", typed(OWN_ATTENTION))
    assert invoke("import", "--format", "aiconfigurator", "--out", tmp_path / "raw.json.gz", table) == 0
    assert "SGLang 0.5.1" in capsys.readouterr().out
    raw = load_measurements(tmp_path / "raw.json.gz")
    assert (raw.gpu, raw.tables[0].kernel) == ("L40S", "flashinfer")
    assert raw.tables[0].numbers("kv_heads").tolist() == [8, 32]  # 0 in these tables means as many as query heads


def test_a_parquet_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    raw = written(tmp_path / "whole.parquet", typed(OWN_ATTENTION)).read_bytes()
    path = tmp_path / "cut.parquet"
    for size in range(0, len(raw), 7):
        path.write_bytes(raw[:size])
        with pytest.raises(DocumentError, match="is not a readable parquet table"):
            import_tables("aiconfigurator", [path])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pa.table({"m": pa.array([], pa.int64())}), "has columns and no rows"),
        (pa.table([pa.array([1]), pa.array([2])], names=["m", "m"]), "header: has column m more than once"),
        (pa.table({}), "has columns and no rows"),
        (pa.table({"m": [1]}), "header: has no column"),
    ],
)
def test_parquet_tables_of_the_wrong_shape_are_refused(table: Any, said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "table.parquet", table)
    with pytest.raises(DocumentError) as caught:
        import_tables("aiconfigurator", [path])
    assert str(caught.value).startswith(f"{path}: {said}")


def test_a_folder_or_nothing_is_not_a_table(tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    for name, said in (("folder.parquet", "is a folder, expected a file"), ("none.parquet", "no such file")):
        with pytest.raises(DocumentError, match=said):
            import_tables("aiconfigurator", [tmp_path / name])
