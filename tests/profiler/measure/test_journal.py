"""An interrupted run resumes where it was: no measurement is lost, and no damaged one is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.formats.errors import DocumentError
from hetis.profiler.measure.journal import journal_in, journal_of, points_in, read_journal
from hetis.profiler.measure.points import Measured, MeasuredPoint, TimedSample

SETTINGS = {"device": "cpu", "model": "m"}
FOUND = [
    Measured(
        point=MeasuredPoint(op="transfer", kernel="copy", columns={"num_bytes": 2**i}, texts={"path": "d2d"}),
        sample=TimedSample(seconds=1e-6 * i, spread=0.01),
    )
    for i in range(1, 4)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three points."""
    where = journal_of(tmp_path / "raw.json")
    with journal_in(where, SETTINGS, FOUND[:1]) as add:
        for found in FOUND[1:]:
            add(found)
    return where


def test_what_was_written_is_read(path: Path) -> None:
    assert path.name == "raw.json.journal"
    assert read_journal(path, SETTINGS) == FOUND


def test_points_are_counted_without_settings(path: Path, tmp_path: Path) -> None:
    assert points_in(path) == 3
    with journal_in(tmp_path / "fresh", SETTINGS, []):
        assert points_in(tmp_path / "fresh") == 0
    path.write_bytes(b"\xff\n\n")
    assert points_in(path) is None


def test_a_line_that_was_cut_off_is_dropped(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])
    assert read_journal(path, SETTINGS) == FOUND[:2]


def test_a_run_with_other_settings_is_refused_with_all_differences(path: Path) -> None:
    with pytest.raises(DocumentError) as caught:
        read_journal(path, {"device": "cuda", "model": "n"})
    assert [str(problem) for problem in caught.value.problems] == [
        f"{path}: device: is 'cpu' in the interrupted run, now 'cuda'",
        f"{path}: model: is 'm' in the interrupted run, now 'n'",
    ]


def test_a_damaged_line_is_named(path: Path) -> None:
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], "{nonsense", *lines[2:]]))
    with pytest.raises(DocumentError, match=r"journal:2: is damaged"):
        read_journal(path, SETTINGS)


@pytest.mark.parametrize(
    ("value", "changed"),
    [("1e-06", '"x"'), ("1e-06", "0"), ("1e-06", "NaN"), ("0.01", "-1"), ("0.01", "null"), ('"num_bytes":2', '"b":2.5'),
     ('"copy"', "[]"), ('{"path":"d2d"}', "7")],
)  # fmt: skip
def test_a_line_with_nonsense_in_it_is_named(path: Path, value: str, changed: str) -> None:
    first, second, *rest = path.read_text().split("\n")
    assert value in second
    path.write_text("\n".join([first, second.replace(value, changed), *rest]))
    with pytest.raises(DocumentError, match=r"journal:2: is damaged"):
        read_journal(path, SETTINGS)


def test_a_journal_cut_off_anywhere_keeps_whole_lines_or_is_refused(path: Path) -> None:
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        if size >= raw.index(b"\n"):  # the header is complete
            assert read_journal(path, SETTINGS) == FOUND[: max(0, raw[:size].count(b"\n") - 1)]
        else:
            with pytest.raises(DocumentError):
                read_journal(path, SETTINGS)


@pytest.mark.parametrize("text", ["", "[]\n", '{"hetis_journal": 2}\n', "hello\n"])
def test_what_is_no_journal_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(DocumentError, match="is not the journal of an interrupted"):
        read_journal(path, SETTINGS)


def test_a_missing_folder_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    with (
        pytest.raises(DocumentError, match="cannot be written"),
        journal_in(tmp_path / "none" / "x.journal", SETTINGS, []),
    ):
        pytest.fail("it is there")
