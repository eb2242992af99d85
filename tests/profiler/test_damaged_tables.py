"""Truncated and corrupted tables: a clear error or an equal result, never a partial one and never a traceback."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.measurements import measurements_to_data
from tests.profiler.small_tables import SMALL_TABLES
from tools.simulator_tables import import_tables

NONSENSE = (
    "", "abc", "-1", "0", "0.5", "1e400", "-1e400", "nan", "1_0", "９", "9" * 30, "1e15", "1e-300", "True", "yes", '"',
    "\x00", "3", "7", "NVIDIA L41S", "a,b", "\n", "true",
)  # fmt: skip


def result_of(form: str, path: Path, content: bytes) -> object:
    """Return the imported data, or the messages that refuse it."""
    path.write_bytes(content)
    try:
        return [measurements_to_data(one) for one in import_tables(form, [path])]
    except DocumentError as error:
        if not all(problem.file == str(path) and problem.message for problem in error.problems):
            raise
        return None


def parameters() -> list[object]:
    return [pytest.param(form, text, id=name) for form, name, text in SMALL_TABLES if form == "aiconfigurator"]


@pytest.mark.parametrize(("form", "text"), parameters())
def test_a_table_cut_off_anywhere_is_refused_unless_only_whole_rows_are_missing(
    form: str, text: str, tmp_path: Path
) -> None:
    raw, path = text.encode(), tmp_path / "table.csv"
    for size in range(len(raw)):
        assert result_of(form, path, raw[:size]) is None or raw[:size].endswith(b"\n"), raw[:size][-40:]


@pytest.mark.parametrize(("form", "text"), parameters())
def test_line_ends_of_other_systems_and_quotes_change_nothing(form: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    expected = result_of(form, path, text.encode())
    assert expected is not None or "num_experts" in text
    quoted = io.StringIO()
    csv.writer(quoted, quoting=csv.QUOTE_ALL).writerows(csv.reader(io.StringIO(text)))
    for other in (text.replace("\n", "\r\n"), "\ufeff" + text, quoted.getvalue()):
        assert result_of(form, path, other.encode()) == expected


@pytest.mark.parametrize(("form", "text"), parameters())
def test_every_cell_may_hold_nonsense(form: str, text: str, tmp_path: Path) -> None:
    lines = [line.split(",") for line in text.splitlines()]
    for row in (0, 1):
        for column in range(len(lines[0])):
            for nonsense in NONSENSE:
                changed = [list(line) for line in lines]
                changed[row][column] = nonsense
                result_of(form, tmp_path / "table.csv", "".join(",".join(line) + "\n" for line in changed).encode())


def test_a_number_that_lost_its_end_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("gpu,batch_size,sampler_e2e_ms\nA100,8,0.588016\nA40,128,5.2")
    with pytest.raises(DocumentError) as caught:
        import_tables("vidur", [path])
    assert str(caught.value) == (
        f"{path}:3: ends in the middle of a line and may be truncated: if it is complete, add a newline"
    )


def test_a_table_in_another_encoding_is_not_said_to_be_truncated(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("gpu,batch_size,sampler_e2e_ms\nA100,8,0.588016\n", encoding="utf-16")
    with pytest.raises(DocumentError, match="is not UTF-8 text"):
        import_tables("vidur", [path])


@pytest.mark.parametrize(
    ("row", "said"), [("A100,8,abc", "row 5: sampler_e2e_ms: is 'abc'"), ("A100,8", "row 5: has 2")]
)
def test_rows_have_the_numbers_of_their_lines(row: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"\ngpu,batch_size,sampler_e2e_ms\nA100,4,0.5\n\n{row}\n")
    with pytest.raises(DocumentError) as caught:
        import_tables("vidur", [path])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("form", "name", "column", "value", "said"),
    [
        ("vidur", "layers", "attn_rope_ms", "abc", "attn_rope_ms: is 'abc', expected a number"),
        ("vidur", "layers", "use_gated_mlp", "maybe", "use_gated_mlp: is 'maybe', expected true or false"),
        ("vidur", "layers", "n_head", "7", "n_head: is 7, must divide the 8192 of n_embd"),
        ("vidur", "attention", "is_prefill", "", "is_prefill: is '', expected true or false"),
        ("vidur", "attention", "tp", "3", "tp: is 3, must divide the 64 heads of n_q_head"),
        ("llmservingsim", "attention", "batch_size", "1e17", "batch_size: is 1e17, must be <= 9007199254740992"),
        ("llmservingsim", "attention", "batch_size", "1_0", "batch_size: is '1_0', expected a number"),
        ("llmservingsim", "attention", "batch_size", "９", "batch_size: is '９', expected a number"),
    ],
)
def test_what_is_wrong_in_a_cell_is_said(
    form: str, name: str, column: str, value: str, said: str, tmp_path: Path
) -> None:
    text = next(text for its_form, its_name, text in SMALL_TABLES if (its_form, its_name) == (form, name))
    header, first, *rest = (line.split(",") for line in text.splitlines())
    first[header.index(column)] = value
    path = tmp_path / "table.csv"
    path.write_text("".join(",".join(line) + "\n" for line in (header, first, *rest)))
    with pytest.raises(DocumentError) as caught:
        import_tables(form, [path])
    assert str(caught.value) == f"{path}: row 2: {said}"


@pytest.mark.parametrize("spelling", ["True", "true", "TRUE", "1"])
def test_a_flag_may_be_spelled_as_tools_do(spelling: str, tmp_path: Path) -> None:
    text = next(text for form, name, text in SMALL_TABLES if (form, name) == ("vidur", "attention"))
    path = tmp_path / "table.csv"
    assert result_of("vidur", path, text.replace("True", spelling).encode()) == result_of("vidur", path, text.encode())
