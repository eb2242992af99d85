"""A table in the documents either measures the present code, or is marked as stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import staleness
from benchmarks.staleness import MARK, ROOT, SOURCES, definitions_of, digest_of, is_source, mark, stamp, tables

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
    document.write_text(f"before\n<!-- sharing -->\n{head}{TABLE}<!-- end sharing -->\nafter\n", encoding="utf-8")
    for _ in range(2):  # marking again changes nothing
        mark(document)
        (table,) = tables(document)
        text = document.read_text(encoding="utf-8")
        assert (table.is_stale, table.is_marked, text.count(MARK)) == (True, True, 1)
    assert text.startswith("before\n<!-- sharing -->\n<!-- sources ")
    assert text.endswith(f"{MARK}\n\n{TABLE}<!-- end sharing -->\nafter\n")
    monkeypatch.setattr(staleness, "digest", lambda name: "00ff")
    mark(document)
    assert (MARK in document.read_text(encoding="utf-8")) == (known is None or "00ff" not in known)


def test_a_table_of_today_is_not_stale(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text(f"<!-- sharing -->\n{stamp('sharing')}\n{TABLE}<!-- end sharing -->\n", encoding="utf-8")
    mark(document)
    assert MARK not in document.read_text(encoding="utf-8")


MODULE = '''"""Docstring."""

from __future__ import annotations

from functools import cache
from math import floor as down
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TEXT", "first"]

TEXT = "# kept"  # a comment
LIMIT = 3


@cache
def first(path: Path) -> int:
    """Two
    lines, größer."""
    from json import loads

    return down(loads(path.name)) + LIMIT


class Both:
    """A class."""

    one: int
    """The first."""

    @property
    def two(self) -> int: return self.one  # two of them
'''


def test_definitions_are_the_code_of_statements() -> None:
    text, limit, first, both = definitions_of(MODULE)
    assert (text, limit) == ('TEXT = "# kept"', "LIMIT = 3")
    code = "@cache\ndef first(path: Path) -> int:\n    return down(loads(path.name)) + LIMIT"
    assert first == f"down = math.floor\n{code}"
    assert both == "class Both:\n    one: int\n    @property\n    def two(self) -> int: return self.one"


def test_words_about_the_code_do_not_make_a_table_stale() -> None:
    for old, new in (
        ('"""Docstring."""', '"""Another\ndocstring."""'),
        ("  # a comment", ""),
        ("lines, größer.", "lines."),
        ("LIMIT = 3\n", "LIMIT = 3   \n\n# A comment.\n\n\n"),
        ('"""A class."""', '"""A class."""  # indeed'),
    ):
        assert old in MODULE
        assert digest_of([MODULE.replace(old, new)]) == digest_of([MODULE])


def test_a_file_of_data_counts_as_a_whole() -> None:
    """A description in it counts too: unlike a docstring, it may be a name that something is looked up by."""
    assert digest_of(['{"a": [1.5, null], "b": "text"}\n']) != digest_of(['{"a": [1.5, true], "b": "text"}\n'])
    assert digest_of(['{"a": 1, "b": "text"}\n']) != digest_of(['{"a": 1, "b": "other"}\n'])
    data = [source for source in SOURCES["silicon"] if source.endswith(".json")]
    assert data
    assert all(is_source(source, SOURCES["silicon"]) for source in data)
    assert not is_source("profiler/hetis/profiler/other.json", ("profiler/hetis/profiler",))


def test_a_definition_on_the_line_of_its_docstring_counts() -> None:
    assert definitions_of('class Empty: "é"; one = 1\n') == ("class Empty: ; one = 1",)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ LIMIT", "- LIMIT"),
        ("first(path", "last(path"),
        ("@cache\n", ""),
        ("@property", "@cached_property"),
        ("LIMIT = 3", "LIMIT = 4"),
        ('"# kept"', '"# changed"'),
        ("math import floor as down", "math import ceil as down"),
        ("math import floor as down", "numpy import floor as down"),
    ],
)
def test_a_changed_definition_makes_a_table_stale(old: str, new: str) -> None:
    assert old in MODULE
    assert digest_of([MODULE.replace(old, new)]) != digest_of([MODULE])


def test_a_definition_that_is_gone_or_twice_there_makes_a_table_stale() -> None:
    assert (
        len({digest_of(texts) for texts in ([MODULE], [MODULE, "LIMIT = 3\n"], [MODULE.replace("LIMIT = 3\n", "")])})
        == 3
    )


def test_a_moved_definition_does_not_make_a_table_stale() -> None:
    """Move ``first`` and its constant to a separate module, with the imports that they need."""
    start, end = MODULE.index("LIMIT = 3"), MODULE.index("class Both")
    rest = MODULE[:start].replace("from math import floor as down\n", "from other import LIMIT, first\n") + MODULE[end:]
    imports = "from functools import cache\nfrom math import floor as down\n"
    assert digest_of([rest, imports + MODULE[start:end]]) == digest_of([MODULE])
    assert digest_of([f"import numpy as np\n{MODULE[start:end]}{imports}", rest]) == digest_of([MODULE])


@pytest.mark.parametrize(
    ("imported", "known_as"),
    [
        ("import numpy as np", "np = .numpy"),
        ("import numpy.typing as npt", "npt = numpy.typing"),
        ("from a.b import c as d", "d = b.c"),
        ("from . import c as d", "d = .c"),
        ("from a.b import c", None),
        ("from a.b import c as c", None),
        ("import a.b as b", None),
    ],
)
def test_renaming_imports_belong_to_the_definitions_that_use_them(imported: str, known_as: str | None) -> None:
    uses, does_not = "def f() -> object:\n    return np, npt, b, c, d", "def g() -> int:\n    return 1"
    with_name = uses if known_as is None else f"{known_as}\n{uses}"
    assert definitions_of(f"{imported}\n{uses}\n{does_not}\n") == (with_name, does_not)
    inside = uses.replace("    return", f"    {imported}\n    return")
    assert definitions_of(f"{inside}\n") == (with_name,)


def test_what_counts_as_a_source() -> None:
    sources = ("a/one.py", "a/folder", "!a/folder/words")
    inside = [path for path in ("a/one.py", "a/folder/x.py", "a/folder/words/x.py", "a/two.py", "a/folder/x.txt") if
              is_source(path, sources)]  # fmt: skip
    assert inside == ["a/one.py", "a/folder/x.py"]
