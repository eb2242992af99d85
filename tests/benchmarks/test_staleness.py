"""A table in the documents either measures the present code, or says that it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import staleness
from benchmarks.staleness import MARK, ROOT, SOURCES, code_of, is_source, mark, stamp, tables

TABLE = "2026-11-20: 2 cores.\n\n| name |\n| --- |\n| one |\n"


def test_no_table_is_silently_stale() -> None:
    found = [table for document in staleness.documents() for table in tables(document)]
    assert found
    silent = [table.name for table in found if table.is_stale and not table.is_marked]
    assert not silent, "their sources have changed: run python -m benchmarks.staleness --mark"
    too_modest = [table.name for table in found if table.is_marked and not table.is_stale]
    assert not too_modest, "they measure today's code: run python -m benchmarks.staleness --mark"


def test_all_sources_exist() -> None:
    named = {source.lstrip("!") for sources in SOURCES.values() for source in sources}
    assert not [source for source in named if not (ROOT / source).exists()]


@pytest.mark.parametrize("known", ["sources 00ff: measured at 1a2b3c4", "sources not recorded", None])
def test_marks_come_and_go(tmp_path: Path, known: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "doc.md"
    head = "" if known is None else f"<!-- {known} -->\n"
    document.write_text(f"before\n<!-- layers -->\n{head}{TABLE}<!-- end layers -->\nafter\n", encoding="utf-8")
    for _ in range(2):  # marking again changes nothing
        mark(document)
        (table,) = tables(document)
        text = document.read_text(encoding="utf-8")
        assert (table.is_stale, table.is_marked, text.count(MARK)) == (True, True, 1)
    assert text.startswith("before\n<!-- layers -->\n<!-- sources ")
    assert text.endswith(f"{MARK}\n\n{TABLE}<!-- end layers -->\nafter\n")
    monkeypatch.setattr(staleness, "digest", lambda name: "00ff")
    mark(document)
    assert (MARK in document.read_text(encoding="utf-8")) == (known is None or "00ff" not in known)


def test_a_table_of_today_is_not_stale(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text(f"<!-- layers -->\n{stamp('layers')}\n{TABLE}<!-- end layers -->\n", encoding="utf-8")
    mark(document)
    assert MARK not in document.read_text(encoding="utf-8")


def test_words_about_the_code_do_not_make_a_table_stale() -> None:
    function = 'def f() -> int:\n    """Two\n    lines."""\n    return 1\n'
    module = f'"""Docstring."""\n\nTEXT = "# kept"  # a comment\n\n\n{function}'
    assert code_of(module) == 'TEXT = "# kept"\ndef f() -> int:\n    return 1'
    assert code_of(module.replace("return 1", "return 2")) != code_of(module)


def test_what_counts_as_a_source() -> None:
    sources = ("a/one.py", "a/folder", "!a/folder/words")
    inside = [path for path in ("a/one.py", "a/folder/x.py", "a/folder/words/x.py", "a/two.py", "a/folder/x.txt") if
              is_source(path, sources)]  # fmt: skip
    assert inside == ["a/one.py", "a/folder/x.py"]
