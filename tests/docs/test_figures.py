"""Pages agree with the tables: excerpts are those of the tables, and tables say where they are from."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT
from tools import tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_excerpts_are_what_their_tables_hold(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.refreshed(text, from_root=page.parent == ROOT) == text, "run python -m tools.tables"


def test_every_table_is_led_to_and_every_excerpt_has_one() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    known = {path.name for path in tables.DATA.glob("*.csv")}
    linked = set(re.findall(r"\(data/([\w-]+\.csv)\)", text))
    asked = {tables.path_of(one.table).name for page in PAGES for one in tables.excerpts(page.read_text("utf-8"))}
    assert linked | asked <= known
    assert known <= linked | asked | {"profiles-past-increments.csv"}  # the latter is used in a sentence of profiles.md


def test_every_table_names_the_commit_and_the_day_on_which_it_was_made() -> None:
    made = tables.makings()
    assert made.keys() == {path.stem for path in tables.DATA.glob("*.csv")}
    for making in made.values():
        assert re.fullmatch(r"[0-9a-f]{7,40}", making.commit)
        date.fromisoformat(making.date)


def test_a_table_records_when_and_where_it_was_made(tmp_path: Path) -> None:
    tables.write("other table", ["a"], [[1]], folder=tmp_path)
    tables.write("t", ["a"], [[1]], folder=tmp_path)
    made = tables.makings(tmp_path)
    assert sorted(made) == ["other-table", "t"]
    assert str(made["t"]) == f"made {date.today()} at {made['t'].commit} on {made['t'].machine}"
    assert "cores of" in str(made["t"])


def test_readme_shows_what_the_tables_of_the_plan_say() -> None:
    """The README states the same figures of the same plan everywhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        len(
            set(
                re.findall(r"^Goodput +([\d.]+)", text, re.MULTILINE)
                + re.findall(r"^Bound +([\d.]+)", text, re.MULTILINE)
            )
        )
        == 1
    )
    (uniform,) = set(re.findall(r"^Uniform +([\d.]+)", text, re.MULTILINE))
    assert f"best plan serves {uniform} requests/s" in text


def test_an_excerpt_follows_its_table() -> None:
    """An excerpt has the requested columns and rows, and links to the rest."""
    made = tables.Making(commit="1a2b3c4", date="2026-12-01", machine=None)
    rows = [{"name": "a 1", "value": "1", "note": "x|y"}, {"name": "b", "value": "22", "note": ""}]
    shown = tables.markdown(tables.parse("t; columns: name | note; rows: ^a"), rows, "data/t.csv", made)
    says = "[All 2 rows and 3 columns](data/t.csv), made 2026-12-01 at 1a2b3c4"
    assert shown == f"| name | note |\n| --- | --- |\n| a 1 | x/y |\n\n{says}\n"
    assert "[The table as a file](data/t.csv)" in tables.markdown(tables.parse("t"), rows, "data/t.csv", made)
    with pytest.raises(ValueError, match="no row like '\\^c'"):
        tables.markdown(tables.parse("t; rows: ^c"), rows, "data/t.csv", made)
