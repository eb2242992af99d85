"""Pages agree with the tables: excerpts and figures in sentences match the tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.figures import FIGURES, GUARDED, Figure, N, untied
from tests.docs.pages import PAGES, ROOT
from tools import tables


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.page}: {figure.pattern[:40]}")
def test_a_figure_in_a_sentence_is_that_of_its_table(figure: Figure) -> None:
    wrong = list(figure.wrong())
    assert not wrong, "\n".join(wrong)


def test_a_figure_that_is_wrong_is_named_with_its_line() -> None:
    figure = Figure(page="faq.md", table="silicon", pattern=rf"models is off by {N}% on average", values=lambda _: [99])
    (wrong,) = figure.wrong()
    assert re.fullmatch(r"docs/faq\.md:\d+: says [\d.]+ in 'models is off .*', table 'silicon' has 99", wrong)


@pytest.mark.parametrize("page", GUARDED)
def test_every_figure_in_a_sentence_is_tied_to_its_table(page: str) -> None:
    """A percentage or a decimal from no table is a goal or a setting, which STATED lists."""
    assert not list(untied(page))


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
    rows = [{"name": "a 1", "value": "1", "note": "x|y"}, {"name": "b", "value": "22", "note": ""}]
    shown = tables.markdown(tables.parse("t; columns: name | note; rows: ^a"), rows, "data/t.csv")
    assert shown == "| name | note |\n| --- | --- |\n| a 1 | x/y |\n\n[All 2 rows and 3 columns](data/t.csv)\n"
    assert "[The table as a file](data/t.csv)" in tables.markdown(tables.parse("t"), rows, "data/t.csv")
    with pytest.raises(ValueError, match="no row like '\\^c'"):
        tables.markdown(tables.parse("t; rows: ^c"), rows, "data/t.csv")
