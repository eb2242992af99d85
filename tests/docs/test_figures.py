"""Pages agree with the tables: excerpts and figures in sentences are what the tables hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT
from tools import tables

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure in a sentence: ``pattern`` has one group for each number, ``value`` computes them from the table."""

    page: str
    pattern: str
    table: str
    value: Callable[[Rows], Sequence[float]]


def cell(row: str, column: str, *, scale: float = 1.0, **where: str) -> Callable[[Rows], Sequence[float]]:
    """Return the number in one cell: of the row whose first cell begins with ``row`` and that has ``where``."""

    def value(rows: Rows) -> Sequence[float]:
        first = next(iter(rows[0]))
        found = [r for r in rows if r[first].startswith(row) and all(r[name] == text for name, text in where.items())]
        assert found, f"no row {row!r} with {where}"
        return [scale * number(found[0][column])]

    return value


def number(text: str) -> float:
    return float(text.replace(",", "").replace("+", "").removesuffix("%"))


def ratios(prefix: str, column: str, *, contains: str = "") -> Callable[[Rows], Sequence[float]]:
    """Return least and greatest value of a column, over rows whose first cell ends with ``prefix``."""

    def value(rows: Rows) -> Sequence[float]:
        first = next(iter(rows[0]))
        found = [number(r[column]) for r in rows if r[first].endswith(prefix) and contains in r[first]]
        return [min(found), max(found)]

    return value


def gains(cards: str, lengths: str) -> Callable[[Rows], Sequence[float]]:
    """Return the least and the greatest gain of attention workers on such GPUs for such requests."""

    def value(rows: Rows) -> Sequence[float]:
        found = [number(r["ratio"]) for r in rows if r["name"].startswith(f"h100-{cards}, {lengths}")]
        return [min(found), max(found)]

    return value


def held_out(kind: str, column: str) -> Callable[[Rows], Sequence[float]]:
    return cell("all", column, engine="all", kind=kind)


BENCHMARKS, SEARCH, HALF = "benchmarks.md", "placement", "to half percent (s)"


def slowest(gpus: str) -> Callable[[Rows], Sequence[float]]:
    """Return when a gap of 0.5% was proved for the last objective of a fleet."""
    return lambda rows: [max(number(r[HALF]) for r in rows if r["name"].startswith(f"{gpus} GPUs, "))]


FIGURES = [
    Figure(BENCHMARKS, r"12 GPUs was proved after ([\d.]+) s", SEARCH,
           cell("12 GPUs, TTFT 4 s", HALF, name="12 GPUs, TTFT 4 s")),
    Figure(BENCHMARKS, r"after at most ([\d.]+) s on 160 GPUs", SEARCH, slowest("160")),
    Figure(BENCHMARKS, r"([\d.]+) s on 1,000 and", SEARCH, slowest("1,000")),
    Figure(BENCHMARKS, r"([\d.]+) s on 10,000", SEARCH, slowest("10,000")),
    Figure(BENCHMARKS, r"A million GPUs took ([\d.]+) s", SEARCH, slowest("1,000,000")),
    Figure(BENCHMARKS, r"proves 12 GPUs in ([\d.]+) s", SEARCH, cell("12 GPUs, TTFT 4 s, empty cache", "seconds")),
    Figure(BENCHMARKS, r"take 30 s for ([\d.]+)%", SEARCH, cell("10,000 GPUs, goodput", "gap")),
    Figure(BENCHMARKS, r"64 x 8 came to ([\d.]+) times", "dispatch",
           cell("64 x 8, balanced, 1 piece", "speedup vs highs")),
    Figure(BENCHMARKS, r"Over Splitwise at its best it serves ([\d.]+) to\s+([\d.]+) times", "paper",
           ratios(", splitwise", "hetis over")),
    Figure(BENCHMARKS, r"over HexGen ([\d.]+) to ([\d.]+) times", "paper", ratios(", hexgen", "hetis over")),
    Figure(BENCHMARKS, r"serves ([\d.]+) to ([\d.]+) of `hetis`", "paper",
           lambda rows: [1 / over for over in reversed(ratios(", hetis-paper", "hetis over")(rows))]),
    Figure(BENCHMARKS, r"no worse than the other strategy in (\d+) of", "paper",
           lambda rows: [sum(r["no worse"] == "yes" for r in rows if not r["name"].endswith(", hetis"))]),
    Figure(BENCHMARKS, r"requests end (\d+)% to (\d+)% too early", "whole_engine",
           lambda rows: [-100 * max(n), -100 * min(n)] if (n := [number(r["e2e bias"]) for r in rows
                                                                 if "host" not in r["name"]]) else []),
    Figure(BENCHMARKS, r"whole requests are then (\d+)% to (\d+)% off", "whole_engine",
           lambda rows: [100 * min(n), 100 * max(n)] if (n := [number(r["e2e error"]) for r in rows
                                                               if "host" in r["name"]]) else []),
    Figure(BENCHMARKS, r"takes ([\d.]+) ms of CPU at 1,000 reports/s", "service",
           cell("1000 reports/s", "cpu us", scale=1e-3)),
    Figure(BENCHMARKS, r"and ([\d.]+)\s+ms at 5,000", "service", cell("5000 reports/s", "cpu us", scale=1e-3)),
    Figure(BENCHMARKS, r"saturated between ([\d,]+) and [\d,]+\s+reports/s", "service",
           cell("6000 reports/s", "rate per (s)")),
    Figure(BENCHMARKS, r"saturated between [\d,]+ and ([\d,]+)\s+reports/s", "service",
           cell("8000 reports/s", "rate per (s)")),
    Figure(BENCHMARKS, r"connected agent takes (\d+) kB", "service", cell("heartbeats, no", "kb per agent")),
    Figure(BENCHMARKS, r"with a replica (\d+) kB", "service", cell("heartbeats, serving", "kb per agent")),
    Figure(BENCHMARKS, r"is DONE after\s+(\d+) ms", "service", cell("change: DONE", "p50 ms")),
    *(
        Figure("when-attention-workers-help.md", said, "attention_workers", gains(cards, lengths))
        for said, cards, lengths in (
            (r"([\d.]+)x to ([\d.]+)x in all 16 rows", "p100", ""),
            (r"prompts of 8,000 tokens \(([\d.]+)x to ([\d.]+)x\)", "l4", "8000/300"),
            (r"of 16,000 \(([\d.]+)x to ([\d.]+)x\)", "l4", "16000/1000"),
            (r"([\d.]+)x to ([\d.]+)x at 1024/256", "p100", "1024/256"),
            (r"([\d.]+)x to ([\d.]+)x at 8000/300", "p100", "8000/300"),
            (r"([\d.]+)x\s+to ([\d.]+)x at 16000/1000", "p100", "16000/1000"),
        )
    ),
    Figure("comparison.md", r"reaches (\d+)% to (\d+)% of the proven", "published",
           lambda rows: [100 * one for one in ratios(": hexgen2-paper", "ratio")(rows)]),
    Figure("faq.md", r"models is off by ([\d.]+)% on average", "silicon", held_out("dense", "tpot mape")),
    Figure("faq.md", r"on average and TTFT by ([\d.]+)%", "silicon", held_out("dense", "ttft mape")),
    Figure("faq.md", r"with experts by ([\d.]+)%", "silicon", held_out("moe", "tpot mape")),
    Figure("faq.md", r"with experts by [\d.]+% and ([\d.]+)%", "silicon", held_out("moe", "ttft mape")),
    Figure("profiles.md", r"predicts ([\d.]+) times \(median\)", "profiles past increments",
           cell("", "median predicted / measured")),
    Figure("profiles.md", r"is off\s+by ([\d.]+)% of the chunk's", "profiles past increments",
           cell("", "mean error of the chunk's time")),
    Figure("profiles.md", r"on average, over ([\d,]+) chunks", "profiles past increments", cell("", "chunks")),
]  # fmt: skip


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.page}: {figure.pattern[:40]}")
def test_a_figure_in_a_sentence_is_that_of_its_table(figure: Figure) -> None:
    text = (ROOT / "docs" / figure.page).read_text(encoding="utf-8")
    found = re.findall(figure.pattern, text)
    assert found, "the sentence has changed: change the pattern with it"
    expected = figure.value(tables.read(figure.table))
    for groups in found:
        said = groups if isinstance(groups, tuple) else (groups,)
        assert len(said) == len(expected)
        for written, value in zip(said, expected, strict=True):
            decimals = len(written.partition(".")[2])
            tolerance = 100 if "," in written and value > 1000 and written.endswith("00") else 0.5001 * 10**-decimals
            assert abs(number(written) - value) <= tolerance, f"{figure.table} has {value}, the page says {written}"


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
    assert known <= linked | asked | {"profiles-past-increments.csv"}  # that one is used in a sentence of profiles.md


def test_readme_shows_what_the_tables_of_the_plan_say() -> None:
    """README names the same plan with the same figures everywhere."""
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
