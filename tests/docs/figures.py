"""The sentences of the pages that quote tables of ``docs/data``, and how the tables yield their figures.

A sentence that quotes a table belongs here, whichever page it is on. After a table is measured again, the test names
each outdated line, its figure and the table's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from statistics import fmean, median, quantiles

from tests.docs.pages import ROOT
from tools import tables

WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
HALF = "to half percent (s)"


class Table:
    """A table by its first column: ``table["row", "column"]`` is a number."""

    def __init__(self, rows: Sequence[Mapping[str, str]]) -> None:
        self.rows = rows
        self.first = next(iter(rows[0]))

    def __getitem__(self, cell: tuple[str, str]) -> float:
        """Return the number in a cell of the row of that name, or else of the only row whose name begins with it."""
        name, column = cell
        found = [row for row in self.rows if row[self.first] == name]
        found = found or [row for row in self.rows if row[self.first].startswith(name)]
        assert len(found) == 1, f"{len(found)} rows begin with {name!r}"
        return number(found[0][column])

    def where(self, names: str) -> list[Mapping[str, str]]:
        """Return the rows whose name matches the regular expression."""
        found = [row for row in self.rows if re.search(names, row[self.first])]
        assert found, f"no row matches {names!r}"
        return found

    def column(self, column: str, names: str = "") -> list[float]:
        """Return the numbers of a column in those rows, without the cells that have none."""
        return [number(row[column]) for row in self.where(names) if row[column] != "-"]

    def count(self, holds: Callable[[Mapping[str, str]], bool], names: str = "") -> int:
        return sum(holds(row) for row in self.where(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Figures in a sentence: each group of ``pattern`` is one, and ``values`` gives them in the same order.

    A pattern without groups is a claim without a number: ``values`` tells whether the table confirms it. A space of a
    pattern stands for any white space.
    """

    page: str
    pattern: str
    table: str
    values: Callable[[Table], Sequence[float]]

    def wrong(self) -> Iterator[str]:
        """Yield the page's figures that disagree with the table, each with its line."""
        text = (ROOT / "docs" / self.page).read_text(encoding="utf-8")
        found = list(re.finditer(self.pattern.replace(" ", r"\s+"), text))
        if not found:
            yield f"docs/{self.page}: no sentence matches {self.pattern!r}: change the pattern with the sentence"
        expected = self.values(Table(tables.read(self.table)))
        for match in found:
            line = text.count("\n", 0, match.start()) + 1
            said = " ".join(match[0].split())
            if not match.groups():
                if not all(expected):
                    yield f"docs/{self.page}:{line}: {said!r} does not hold in table {self.table!r}"
                continue
            assert len(match.groups()) == len(expected), f"{self.pattern!r} has other groups than values"
            for written, value in zip(match.groups(), expected, strict=True):
                if not agrees(written, value):
                    yield f"docs/{self.page}:{line}: says {written} in {said!r}, table {self.table!r} has {value:.5g}"


def untied(page: str) -> Iterator[str]:
    """Yield the figures in sentences of a page that are compared with no table: percentages and decimals."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    tied = {
        place
        for figure in FIGURES
        if figure.page == page
        for match in re.finditer(figure.pattern.replace(" ", r"\s+"), text)
        for group in range(1, len(match.groups()) + 1)
        for place in range(*match.span(group))
    }
    sentences = _NO_SENTENCE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    for found in re.finditer(r"(?<![\w/.,-])\d[\d,]*(\.\d+%?|%)", sentences):
        if found.start() not in tied and found[0] not in STATED:
            yield f"docs/{page}:{text.count(chr(10), 0, found.start()) + 1}: {found[0]} is of no table"


def number(text: str) -> float:
    """Return the number in a cell or a sentence, nan for none."""
    if text in WORDS:
        return WORDS.index(text)
    return nan if text == "-" else float(text.replace(",", "").replace("+", "").removesuffix("%"))


def agrees(written: str, value: float) -> bool:
    """Return whether a value rounds to the written number."""
    decimals = len(written.partition(".")[2])
    is_rounded = "," in written and value > 1000 and written.endswith("00")
    return abs(number(written) - value) <= (100 if is_rounded else 0.5001 * 10**-decimals)


def span(values: Sequence[float], scale: float = 1.0) -> list[float]:
    """Return the least and the greatest."""
    return [scale * min(values), scale * max(values)]


def slowest(gpus: str) -> Callable[[Table], Sequence[float]]:
    """Return when a gap of 0.5% was proved for the last objective of a fleet."""
    return lambda t: [max(number(row[HALF]) for row in t.where(f"^{gpus} GPUs, "))]


def cells(*wanted: tuple[str, str], scale: float = 1.0) -> Callable[[Table], Sequence[float]]:
    return lambda t: [scale * t[one] for one in wanted]


def wins(fleet: str, best: str, over: str) -> Callable[[Table], Sequence[float]]:
    """Return whether a strategy is as good as `hetis` with long prompts under 50 ms, and better than another one."""
    row = f"{fleet}, 8000/300, TPOT 50 ms"
    return lambda t: [t[row, best] == t[row, "hetis"] > t[row, over]]


def lost(row: str, half_width: bool = False) -> Callable[[Table], Sequence[float]]:
    """Return by how much percent an ablation changes the rate, and optionally the half width of its interval."""
    return lambda t: [
        100 * (t[row, "over full"] - 1),
        *([100 * t[row, "over full half width"]] if half_width else []),
    ]


def parts(part: str) -> Callable[[Table], Sequence[float]]:
    """Return the row of an ablation in the page on attention workers."""

    def values(t: Table) -> Sequence[float]:
        paper, longbench = (lost(f"{case}: {part}", True)(t) for case in (PAPER, LONGBENCH))
        planned = t[f"{LONGBENCH}: {part}", "planned rps"] / t[f"{LONGBENCH}: full", "planned rps"]
        with_plan = [100 * (planned - 1)] if part == "without attention workers" else []
        return [*paper, *longbench, *with_plan, *lost(f"{SHORT}: {part}")(t), *lost(f"{LONG}: {part}")(t)]

    return values


def with_workers(case: str, column: str = "throughput rps") -> Callable[[Table], Sequence[float]]:
    """Return the rates without and with attention workers, and their ratio."""

    def values(t: Table) -> Sequence[float]:
        without, full = t[f"{case}: without attention workers", column], t[f"{case}: full", column]
        return [without, full, full / without]

    return values


def held_out(kind: str, column: str) -> Callable[[Table], Sequence[float]]:
    return lambda t: [number(row[column]) for row in t.where("^all$") if row["engine"] == "all" and row["kind"] == kind]


def over_all_held_out(column: str) -> Callable[[Table], Sequence[float]]:
    """Return the mean over the points of both kinds."""

    def values(t: Table) -> Sequence[float]:
        sizes = [held_out(kind, "n")(t)[0] for kind in ("dense", "moe")]
        means = [held_out(kind, column)(t)[0] for kind in ("dense", "moe")]
        return [sum(size * mean for size, mean in zip(sizes, means, strict=True)) / sum(sizes)]

    return values


def gains(cards: str, lengths: str = "") -> Callable[[Table], Sequence[float]]:
    """Return the least and the greatest gain of attention workers on such GPUs for such requests."""
    return lambda t: span(t.column("ratio", f"^h100-{cards}, {lengths}"))


def little(cards: str) -> Callable[[Table], Sequence[float]]:
    """Return the greatest gain below 3%, in percent, how many rows it covers, and how many rows there are."""

    def values(t: Table) -> Sequence[float]:
        found = [100 * (one - 1) for one in t.column("ratio", f"^h100-{cards}, ")]
        small = [one for one in found if one < 3]
        return [max(small), len(small), len(found)]

    return values


def others(fleet: str) -> Callable[[Table], Sequence[float]]:
    """Return under how many wrong profiles other replicas are chosen, and how many there are."""
    return lambda t: [sum(t.column(column, fleet)) for column in ("other replicas", "plans")]


def over_planned(row: str) -> Callable[[Table], Sequence[float]]:
    """Return by how much percent the simulated rate exceeds the planned one."""
    return lambda t: [100 * (t[row, "throughput rps"] / t[row, "planned rps"] - 1)]


def by_model(column: str, engine: str, *models: str) -> Callable[[Table], Sequence[float]]:
    return lambda t: [
        number(row[column]) for model in models for row in t.rows if (row["engine"], row["model"]) == (engine, model)
    ]


def over_best(scenario: str, gpu: str, model: str = "") -> Callable[[Table], Sequence[float]]:
    """Return the planned rates over the best published ones, of a scenario on such GPUs, in the order of the table."""
    return lambda t: [
        number(row["over best"])
        for row in t.where(f"^{scenario}$")
        if re.match(gpu, row["gpu"]) and row["model"].startswith(model)
    ]


def in_range(model: str = "", profile: str = "") -> Callable[[Table], Sequence[float]]:
    """Return the number of groups in the plan's range, and of all, of such models and profiles."""

    def counts(t: Table) -> Sequence[float]:
        rows = [r for r in t.where("") if r["model"].startswith(model) and r["profile"].startswith(profile)]
        return [sum(row["in range"] == "yes" for row in rows), len(rows)]

    return counts


def batches(gpu: str, engine: str, column: str) -> Callable[[Table], Sequence[float]]:
    """Return the magnitude of a column over all models of an engine on a GPU."""
    return lambda t: [
        abs(number(row[column])) for row in t.where(f"^{gpu}$") if (row["engine"], row["model"]) == (engine, "all")
    ]


def operators(t: Table) -> list[Mapping[str, str]]:
    """Return the trials of single operators on GPUs that are left out."""
    return [row for row in t.where(": ") if not row["name"].startswith("plans")]


def covered_elsewhere(t: Table) -> Sequence[float]:
    """Return the covered share, in percent, without the trials whose range is the largest error of all."""
    widest = max(number(row["range"]) for row in operators(t))
    return [100 * fmean(number(row["covered"]) for row in operators(t) if number(row["range"]) < widest)]


def calm(t: Table) -> Sequence[float]:
    """Return the calm p99 of most rows, and of those in which agents reconnected, and how many these are."""
    found = t.column("calm p99 ms")
    slow = [one for one in found if one > 40]
    return [*span([one for one in found if one <= 40]), *span(slow), len(slow)]


# Goals and settings of benchmarks, and statements of papers and GPU vendors.
STATED = {"0.1%", "0.5", "0.5%", "2.25", "1.33", "1.49", "0.1", "10%", "20%", "90%", "95%", "1.5", "1.645"}
GUARDED = ("benchmarks.md", "when-attention-workers-help.md", "tenants.md", "dispatch.md")
_NO_SENTENCE = re.compile(
    r"```.*?```|<!-- .*? -->|`[^`]*`|\]\([^)]*\)|^(?:#|\||\d{4}-\d\d-\d\d:).*?$", re.DOTALL | re.MULTILINE
)

ANY = "^(?!by |.*MILP)"  # rows of searches for a size and an objective
PLANS = "^(?!all)"
OTHERS = "(?<!, hetis)$"
SLOWED = "the second turns into 1/4 halfway"
SHORT, LONG = "2 H100 + 8 P100, 8000/300, 50 ms", "2 H100 + 8 P100, 16000/1000, 100 ms"
SHARING, SHARING_RULES = "160 GPUs, 3 models: ", ("sharing-incentive", "max-min", "equal-throughput")
DECODE = "decode, at the planned utilisation"
PARTS = r"\| #% \+- #% \| #% \+- #% \| #% \| #% \|"  # a row of "what each part is worth"
LONGBENCH, PAPER = "2 H100 + 8 P100, LongBench, 100 ms", "paper, azure, 5 s and 200 ms"
COPIES, L4 = "2 H100 + 8 L4, 500/2000, 100 ms", "2 H100 + 8 L4, 16000/1000, 100 ms"
N = r"([-+]?[\d.,]*\d)"  # a number


def over_planned_ttft(t: Table, column: str) -> list[float]:
    """Return a simulated TTFT over the planned one, of the rows that have it."""
    return [number(row[column]) / number(row["ttft"]) for row in t.rows if row[column] != "-"]


def upper_quartile(values: Sequence[float]) -> float:
    return quantiles(values, n=4, method="inclusive")[2]


def within_2(t: Table, share: str, roles: str) -> list[float]:
    """Return how many planned and modelled quotients are between 1/2 and 2 at a share of the rate, and of how many."""
    (row,) = t.where(f"^all of {roles} roles, {share}")
    (planned, of_all), (modelled, _) = (row[name].split(" of ") for name in ("planned within 2", "model within 2"))
    return [float(planned), float(modelled), float(of_all)]


def _of(page: str, table: str, *sentences: tuple[str, Callable[[Table], Sequence[float]]]) -> list[Figure]:
    """Return the figures of a table on a page; ``#`` in a pattern is a number, and ``@`` one that may be a word."""
    return [
        Figure(page=page, table=table, pattern=said.replace("#", N).replace("@", rf"({N[1:-1]}|\w+)"), values=values)
        for said, values in sentences
    ]


_benchmarks = partial(_of, "benchmarks.md")
_workers = partial(_of, "when-attention-workers-help.md")

FIGURES = [
    *_benchmarks(
        "placement",
        ("12 GPUs was proved after # s", cells(("12 GPUs, TTFT 4 s", HALF))),
        ("after at most # s on 160 GPUs", slowest("160")),
        ("# s on 1,000 and", slowest("1,000")),
        ("# s on 10,000", slowest("10,000")),
        ("A million GPUs took # s", slowest("1,000,000")),
        (
            "plans came within #, # and # s",
            lambda t: [max(t.column("first plan (s)", f"^{gpus} GPUs, ")) for gpus in ("160", "1,000", "10,000")],
        ),
        (
            "bounds within #, # and # s",
            lambda t: [max(t.column("first bound (s)", f"^{gpus} GPUs, ")) for gpus in ("160", "1,000", "10,000")],
        ),
        ("proves 12 GPUs in # s", cells(("12 GPUs, TTFT 4 s, empty cache", "seconds"))),
        ("take # s for #%", cells(("10,000 GPUs, goodput", "seconds"), ("10,000 GPUs, goodput", "gap"))),
    ),
    *_benchmarks(
        "placement_any",
        (
            "exact search takes # s, the program # s",
            cells(("12 GPUs, same family as MILP", "seconds"), ("12 GPUs, compact MILP", "seconds")),
        ),
        (
            "# of these # searches",
            lambda t: [len(t.column(HALF, ANY)), len(t.where(ANY))],
        ),
        (
            "#% on 32 GPUs, #% on 60, #% for the goodput of 160",
            cells(("32 GPUs", "gap"), ("60 GPUs", "gap"), ("160 GPUs, goodput", "gap")),
        ),
        ("for 20 and 40 GPUs took # and # s", cells(("20 GPUs, TTFT 4 s", "seconds"), ("40 GPUs", "seconds"))),
    ),
    *_benchmarks(
        "strategies",
        (r"disaggregated prefill and decode wins on 8 A100 \+ 8 L4", wins("8 A100 + 8 L4", "hexgen2", over="hexgen")),
        (r"unified replicas on 4 H100 \+ 8 L4 with long prompts", wins("4 H100 + 8 L4", "hexgen", over="hexgen2")),
        (r"attention workers on 2 H100 \+ 8 P100", wins("2 H100 + 8 P100", "hetis", over="hexgen")),
    ),
    *_benchmarks(
        "engines",
        (
            "gives away #% to #% of the best plan on the three small fleets, and #% to #% on the others",
            lambda t: [
                100 * (1 - one)
                for small in (True, False)
                for one in reversed(
                    span([number(r["vllm over any"]) for r in t.rows if (int(r["gpus"]) <= 20) is small])
                )
            ],
        ),
        ("paper's cluster reaches #%", cells(("paper, 12 GPUs", "vllm-hetis over any"), scale=100)),
    ),
    *_benchmarks(
        "hexgen3",
        (
            "best in # of the # rows, by #% and #%",
            lambda t: [
                t.count(lambda r: number(r["over rest"]) > 1),
                len(t.rows),
                *[100 * (one - 1) for one in sorted(t.column("over rest")) if one > 1],
            ],
        ),
        (
            "beats `hexgen2` in #, and `hexgen` in #, # of them under a limit on TPOT",
            lambda t: [
                t.count(lambda r: number(r["hexgen3"]) > number(r["hexgen2"])),
                t.count(lambda r: number(r["hexgen3"]) > number(r["hexgen"])),
                t.count(lambda r: number(r["hexgen3"]) > number(r["hexgen"]), "TPOT"),
            ],
        ),
        (
            "serves #% to #% of the better one",
            lambda t: span([one for one in t.column("over rest", "500/2000") if one], 100),
        ),
        (
            "Of the # rows of fleets that were chosen, `hexgen3` would exceed what `hetis` serves in @",
            lambda t: [
                len(t.where("^(?!random)")),
                sum(one > 1 for one in t.column("turns over hetis", "^(?!random)")),
            ],
        ),
        (
            "In # of the # random ones it might, by at most #%",
            lambda t: [
                sum(one > 1 for one in t.column("turns over hetis", "^random")),
                len(t.where("^random")),
                100 * (max(t.column("turns over hetis", "^random")) - 1),
            ],
        ),
    ),
    *_benchmarks(
        "token_ranges",
        (
            "Of # cases that both can serve, ranges of tokens are faster in #,",
            lambda t: [
                t.count(lambda r: r["faster"] != "only tokens"),
                t.count(lambda r: r["faster"] == "tokens"),
            ],
        ),
        (
            "all of them a single request of 128,000 tokens",
            lambda t: [r["name"].endswith("1 x 128k") for r in t.rows if r["faster"] == "tokens"],
        ),
        (
            "The # cases of DeepSeek-V3 on eight GPUs",
            lambda t: [t.count(lambda r: r["faster"] == "only tokens", "^DeepSeek-V3, 8 ")],
        ),
        (
            "at # times the time of attention .* and at # times for 64 of 2,000",
            lambda t: [
                t[row, "tokens us"] / t[row, "alone us"]
                for load in ("1 x 128k", "64 x 2k")
                for row in [f"DeepSeek-V3, 8 H200, L4, 100 Gb/s, {load}"]
            ],
        ),
    ),
    *_benchmarks(
        "published",
        (
            r"on @ fleet `hexgen2` found less",
            lambda t: [t.count(lambda r: number(r["value"]) > number(r["proven value"]), ": hexgen2-paper$")],
        ),
    ),
    *_benchmarks(
        "pipeline roles",
        ("prefill pipeline reaches at least #", lambda t: [min(t.column("rate 1.5k", "^prefill"))]),
        ("With M = K the least is #, on LongBench", lambda t: [min(t.column("rate k", "^prefill"))]),
        (
            "the least is [^,]*, on LongBench",
            lambda t: [min(t.column("rate k", "^prefill")) == min(t.column("rate k", "^prefill.*longbench"))],
        ),
        ("A decode pipeline is busy #%", lambda t: [100 * fmean(t.column("busy k", "^decode"))]),
    ),
    *_benchmarks(
        "dispatch",
        (
            "The p99 came to # and # ms",
            cells(("64 x 8, balanced, 1 piece", "p99 ms"), ("1024 x 16, balanced, 1 piece", "p99 ms")),
        ),
        ("64 x 8 came to # times", cells(("64 x 8, balanced, 1 piece", "speedup vs highs"))),
    ),
    *_of(
        "dispatch.md",
        "dispatch",
        ("no more than #% above it", lambda t: [100 * max(t.column("mean gap to best"))]),
        ("and #% in the worst instance", lambda t: [100 * max(t.column("max gap to best"))]),
    ),
    *_of(
        "dispatch.md", "dispatch ties", ("costs #% to #% later", lambda t: span(t.column("over ours", ", any$"), 100))
    ),
    *_benchmarks(
        "queueing",
        (
            "simulated one for # of # plans with unified replicas, that of the model for #",
            lambda t: [within_2(t, "100%", "unified")[position] for position in (0, 2, 1)],
        ),
        ("with separate roles for # and # of #", lambda t: within_2(t, "100%", "separate")),
        (
            "At the lowest rate these are # and # plans, and # and #",
            lambda t: [*within_2(t, "60%", "unified")[:2], *within_2(t, "60%", "separate")[:2]],
        ),
    ),
    *_benchmarks(
        "goodput",
        (
            "# of # plans keep both limits at their own rate",
            lambda t: [t.count(lambda r: r["kept"] == "yes", PLANS), len(t.where(PLANS))],
        ),
        ("the median plans # of the best rate", lambda t: [median(t.column("planned over best", PLANS))]),
        (
            "At [*]kept rps[*] # of # keep the limits",
            lambda t: [t.count(lambda r: r["kept again"] == "yes", PLANS), len(t.where(PLANS))],
        ),
        (
            "with #% to #% of the best rate, #% at the median",
            lambda t: [*span(found := t.column("kept over best", PLANS), 100), 100 * median(found)],
        ),
    ),
    *_benchmarks(
        "simulation",
        ("Of all shapes # are more than 10% off", lambda t: [sum(abs(one - 1) > 0.1 for one in t.column("ratio"))]),
        (
            "the simulated p95 is # times the planned one at the median, # times at the upper quartile, and # times",
            lambda t: [median(found := over_planned_ttft(t, "ttft at plan")), upper_quartile(found), max(found)],
        ),
        (
            "it is # times at the median and # times at the upper quartile; where KV",
            lambda t: [median(found := over_planned_ttft(t, "ttft all seats")), upper_quartile(found)],
        ),
    ),
    *_benchmarks(
        "whole_engine",
        (
            "requests end #% to #% too early",
            lambda t: span([-one for one in t.column("e2e bias", "^((?!host).)*$")], 100),
        ),
        ("whole requests are then #% to #% off", lambda t: span(t.column("e2e error", "host"), 100)),
    ),
    *_benchmarks(
        "paper",
        ("Over Splitwise at its best it serves # to # times", lambda t: span(t.column("hetis over", ", splitwise$"))),
        ("over HexGen's family # to # times", lambda t: span(t.column("hetis over", ", hexgen$"))),
        (
            "serves # to # of `hetis`",
            lambda t: [1 / one for one in reversed(span(t.column("hetis over", ", hetis-paper$")))],
        ),
        (
            "no worse than the other strategy in # of # rows",
            lambda t: [t.count(lambda r: r["no worse"] == "yes", OTHERS), len(t.where(OTHERS))],
        ),
        (
            "In the other one, of the short requests of HumanEval",
            lambda t: ["HumanEval" in r["name"] for r in t.where(OTHERS) if r["no worse"] != "yes"],
        ),
        (
            "serves #% less when simulated",
            lambda t: [100 * (1 - number(r["hetis over"])) for r in t.where(OTHERS) if r["no worse"] != "yes"],
        ),
        (
            r"Llama-2-70B: # planned and # served, beside # and # of `hexgen-paper`",
            cells(
                *(
                    (f"Llama-2-70B, HumanEval, {strategy}", column)
                    for strategy in ("hetis", "hexgen-paper")
                    for column in ("planned rps", "throughput rps")
                )
            ),
        ),
    ),
    *_benchmarks(
        "paper_assumptions",
        (
            "serves less than `hexgen-paper` in all nine cases",
            lambda t: [one < 1 for one in t.column("over hexgen", "as modelled$")],
        ),
        (
            "`hetis-paper` serves # to # times as much on ShareGPT and HumanEval, and # to # times",
            lambda t: [
                x
                for n in ("1,024", "2,048")
                for x in span(t.column("over hexgen", f"(ShareGPT|HumanEval).*reserves {n}"))
            ],
        ),
        ("it cuts #% to #% of them", lambda t: span(t.column("clipped", "LongBench"), 100)),
        (
            "so the ratio stays below 1",
            lambda t: [one < 1 for one in t.column("over hexgen", "LongBench.*reserves")],
        ),
        (
            "with 40 ms more per iteration and stage the ratio is # to #",
            lambda t: span(t.column("over hexgen", "takes 40 ms more per stage")),
        ),
        (
            "NVLink raises the ratio from #–# to #–#",
            lambda t: [x for what in ("as modelled", "NVLink") for x in span(t.column("over hexgen", f"70B.*{what}"))],
        ),
        (
            "up to # times as long in HexGen's plans as modelled, and is shorter in @ of the nine cases",
            lambda t: [
                max(t.column("attention over", "as modelled$")),
                sum(one < 1 for one in t.column("attention over", "as modelled$")),
            ],
        ),
        (
            "make it # times with 70B on ShareGPT",
            cells(("Llama-2-70B, ShareGPT: HexGen runs 128 requests at most", "over hexgen")),
        ),
        (
            "whose rate rises by up to #% in a few rows that restrict it",
            lambda t: [
                100
                * max(
                    t[f"{case}: {what}", "hexgen paper rps"] / t[f"{case}: as modelled", "hexgen paper rps"] - 1
                    for row in t.where("(at most|reserves|per stage)")
                    for case, what in [row["name"].split(": ")]
                )
            ],
        ),
        (
            "Our own search serves #% to #% more than HexGen's",
            lambda t: span([one - 1 for one in t.column("hetis over hexgen", "as modelled$")], 100),
        ),
    ),
    *_benchmarks(
        "emulation",
        (
            "Where a card slows down, [*]hetis[*] follows and the program does not",
            lambda t: [t[f"{SLOWED}: hetis", "over primary"] > 1 > t[f"{SLOWED}: paper", "over primary"]],
        ),
    ),
    *_of(
        "vllm.md",
        "emulation",
        ("makes # times the throughput of [*]primary", cells(("cards of 1, 1, 1/2, 1/4: hetis", "over primary"))),
        ("# times behind a slow link", cells(("4 MB/s and 10 ms to the second: hetis", "over primary"))),
        ("# times when a card becomes slow halfway", cells((f"{SLOWED}: hetis", "over primary"))),
        (
            "where other rules make less than [*]primary only[*]",
            lambda t: [one < 1 for one in t.column("over primary", f"^{SLOWED}: (paper|equal)$")],
        ),
    ),
    *_of(
        "vllm.md",
        "vllm",
        (
            "local, runs took between #% less and #% more time",
            lambda t: [100 * abs(1 - one) for one in span(t.column("ratio to stock", ", local$"))],
        ),
        ("three workers at most #%", lambda t: [100 * (max(t.column("ratio to stock", ", 3 workers$")) - 1)]),
        ("one worker makes # times", lambda t: [1 / t["memory, shm, 1 workers", "ratio to stock"]]),
        ("whose own CPU seconds are # of stock's", cells(("memory, shm, 1 workers", "cpu ratio"))),
        ("With many requests it is # times", lambda t: [1 / t["memory of many, shm, 1 workers", "ratio to stock"]]),
    ),
    *_benchmarks(
        "service",
        ("takes # ms of CPU at 1,000 reports/s", cells(("1000 reports/s", "cpu us"), scale=1e-3)),
        ("and # ms at 3,000", cells(("3000 reports/s", "cpu us"), scale=1e-3)),
        ("saturated at # reports/s", lambda t: t.column("rate per (s)", r"^\d+ reports/s asked for")[-1:]),
        ("an empty call takes # ms of CPU", cells(("empty call, 1 at once", "cpu us"), scale=1e-3)),
        ("connected agent takes # kB", cells(("heartbeats, no", "kb per agent"))),
        ("with a replica # kB", cells(("heartbeats, serving", "kb per agent"))),
        ("is DONE after # ms", cells(("change: DONE", "p50 ms"))),
    ),
    *_of("operations.md", "service", ("GiB and # kB per agent", cells(("heartbeats, serving", "kb per agent")))),
    *_of(
        "tenants.md",
        "sharing",
        (
            "`sharing-incentive` #%, `max-min` #%, `equal-throughput` #%",
            cells(*((SHARING + rule, "lost") for rule in SHARING_RULES), scale=100),
        ),
        ("all known to a gap of #% to #%", lambda t: span([t[SHARING + rule, "gap"] for rule in SHARING_RULES])),
        ("an equal split #%", cells((f"{SHARING}linear equal-split", "lost"), scale=100)),
        ("one tenant would serve # times", cells((f"{SHARING}sharing-incentive", "envy"))),
        ("leave a tenant that would serve # times", cells((f"{SHARING}linear cooperative", "envy"))),
        ("give one tenant #%", cells((f"{SHARING}linear non-cooperative", "least"), scale=100)),
        ("and # of what its equal part", cells((f"{SHARING}linear non-cooperative", "over part"))),
        ("leaves one model without a GPU", lambda t: [t[f"{SHARING}efficiency", "least"] == 0]),
        (
            "Each rule kept its promise",
            lambda t: [": broken" not in r["promise"] for r in t.where("|".join(SHARING_RULES))],
        ),
    ),
    *_of(
        "robustness.md",
        "robustness",
        ("On the paper's cluster @ of # wrong profiles", others("^paper, 12 GPUs")),
        ("on 24 GPUs @ of #", others("24 GPUs")),
        (r"On 2 H100 \+ 8 P100 others are chosen in @ of #", others("^h100-p100")),
        (r"on 2 H100 \+ 8 L4 others are chosen in # of #", others("^h100-l4")),
        (
            "others are chosen in [^,]*, for #% at worst",
            lambda t: [100 * max(t.column("worst goodput loss", "^h100-l4"))],
        ),
        (
            "Of the # wrong profiles of fleet-160 # choose other replicas",
            lambda t: [*reversed(others("^fleet-160")(t))],
        ),
        ("# of the plans miss a limit as planned", lambda t: [sum(t.column("over limit", "^fleet-160"))]),
        (
            "#% of the goodput is lost on average over random errors and #% over corner cases",
            cells(*((f"fleet-160, {kind}", "mean goodput loss") for kind in ("random", "corners")), scale=100),
        ),
        ("by no more than #% on average", lambda t: [100 * max(t.column("mean latency loss", "^fleet-160"))]),
        (
            "miss a limit in # of # plans on the paper's",
            lambda t: [sum(t.column("over limit", "^paper, 12")), sum(t.column("plans", "^paper, 12"))],
        ),
        ("#% slower on average on the paper's cards", cells(("dispatch, paper", "mean latency loss"), scale=100)),
        (
            r"#% on 2 H100 \+ 8 P100 and #% on 4 A100 \+ 8 L4",
            cells(*((f"dispatch, {row}", "mean latency loss") for row in ("H100", "A100")), scale=100),
        ),
        ("and #% to #% at worst", lambda t: span(t.column("worst latency loss", "^dispatch"), 100)),
    ),
    *_workers(
        "attention_workers",
        (r"#x to #x in all 16 rows", gains("p100")),
        (r"at most #% in # rows of #", little("l4")),
        (r"prompts of 8,000 tokens \(#x to #x\)", gains("l4", "8000/300")),
        (r"of 16,000 \(#x to #x\)", gains("l4", "16000/1000")),
        (
            r"more than #% only at prompts of 8,000",
            lambda t: [int(100 * (max(t.column("ratio", "^h100-l4, (?!8000|16000)")) - 1)) + 1],
        ),
        (r"#x to #x at 1024/256", gains("p100", "1024/256")),
        (r"#x to #x at 8000/300", gains("p100", "8000/300")),
        (r"#x to #x at 16000/1000", gains("p100", "16000/1000")),
        (
            r"goes from #x to #x as the limit falls from 200 to 50 ms",
            cells(("h100-p100, 8000/300, 200 ms", "ratio"), ("h100-p100, 8000/300, 50 ms", "ratio")),
        ),
    ),
    *_workers(
        "ablations",
        (r"from nothing to # times", lambda t: [with_workers(LONG)(t)[-1]]),
        (r"16000/1000 \| TPOT 100 ms \| #/s \| #/s \| #x \|", with_workers(LONG)),
        (r"8000/300 \| TPOT 50 ms \| #/s \| #/s \| #x \|", with_workers(SHORT)),
        (r"LongBench \| TPOT 100 ms \| #/s \| #/s \| #x \|", with_workers(LONGBENCH)),
        (r"azure \| 5 s, 200 ms \| #/s \| #/s \| #x \|", with_workers(PAPER)),
        (r"LongBench \| none \| #/s \| #/s \| # \|", with_workers("paper, LongBench, no limits")),
        (r"16000/1000 \| TPOT 100 ms \| #/s \| #/s \| #x \(planned\)", with_workers(L4, "planned rps")),
        (r"500/2000 \| TPOT 100 ms \| #/s \| #/s \| # \|", with_workers(COPIES)),
        (
            r"\| attention workers \| #% \+- #% \| #% \+- #% \(planned #%\) \| #% \| #% \|",
            parts("without attention workers"),
        ),
        (rf"head-level dispatch [^|]*{PARTS}", parts("without head-level dispatch")),
        (rf"\| re-dispatch {PARTS}", parts("without re-dispatch")),
        (
            r"they are worth #% of the planned rate",
            lambda t: [
                100 * (t[f"{COPIES}: full", "planned rps"] / t[f"{COPIES}: without stage copies", "planned rps"] - 1)
            ],
        ),
        (r"that plan is #% below its planned rate", lambda t: [-over_planned(f"{COPIES}: full")(t)[0]]),
        (r"the one without copies #% above its own", over_planned(f"{COPIES}: without stage copies")),
        (
            r"\(# and # times in #\)",
            cells(
                (f"{COPIES}: full", "preemptions"),
                (f"{COPIES}: without stage copies", "preemptions"),
                (f"{COPIES}: full", "requests"),
            ),
        ),
        (
            r"is worth up to #% in this table",
            lambda t: [max(-lost(f"{c}: without head-level dispatch")(t)[0] for c in (PAPER, LONGBENCH, SHORT, LONG))],
        ),
        (r"and costs #% on 2 H100 \+ 8 L4", lost(f"{L4}: without head-level dispatch")),
        (r"one run of # equal requests", cells((f"{L4}: full", "requests"))),
        (r"where re-dispatch costs #%", lost(f"{L4}: without re-dispatch")),
        (
            r"\(# in # requests, # GiB, on the paper's fleet\)",
            cells(*((f"{PAPER}: full", column) for column in ("migrations", "requests", "migrated gib"))),
        ),
    ),
    *_of(
        "comparison.md",
        "published",
        ("reaches #% to #% of the proven", lambda t: span(t.column("ratio", ": hexgen2-paper$"), 100)),
    ),
    *_of(
        "faq.md",
        "silicon",
        ("models is off by #% on average", held_out("dense", "tpot mape")),
        ("on average and TTFT by #%", held_out("dense", "ttft mape")),
        ("with experts by #% and", held_out("moe", "tpot mape")),
        ("with experts by [^%]*% and #%", held_out("moe", "ttft mape")),
    ),
    *_of(
        "accuracy.md",
        "silicon",
        ("six are then predicted within #%", by_model("tpot mape", "trtllm", "DeepSeek-R1-NVFP4")),
        ("under SGLang, #% and #%", by_model("tpot mape", "sglang", "DeepSeek-R1", "Qwen3.5-397B-A17B")),
        (
            "The goals of 10% and 12% TPOT error are kept",
            lambda t: [held_out(kind, "tpot mape")(t)[0] < goal + 0.05 for kind, goal in (("dense", 10), ("moe", 12))],
        ),
        ("over all held-out points .#%", over_all_held_out("ttft mape")),
        ("misses it by # points", lambda t: [held_out("moe", "ttft mape")(t)[0] - 20]),
        (
            "aiconfigurator is further off in all four",
            lambda t: [
                held_out(kind, f"both {what} mape")(t)[0] < held_out(kind, f"peer {what} mape")(t)[0]
                for kind in ("dense", "moe")
                for what in ("tpot", "ttft")
            ],
        ),
    ),
    *_of("robustness.md", "mlperf", ("best results in # of # groups", in_range())),
    *_of("robustness.md", "silicon", (r"models are within #%", held_out("dense", "tpot p90"))),
    *_of(
        "accuracy.md",
        "mlperf",
        (
            "GB300. is planned #% too slow to #% too fast",
            lambda t: [
                100 * (1 - min(over_best("Offline", "G?[BH][123]00", "llama")(t))),
                100 * (max(over_best("Offline", "G?[BH][123]00", "llama")(t)) - 1),
            ],
        ),
        (r"too fast: # on B200, and", over_best("Offline", "B200", "llama3.1-8b")),
        (r"in\s# of # groups: dense", in_range()),
        (r"relatives in # of # groups", in_range("llama", profile="relatives")),
        (r"timed\sin # of #, on", in_range("llama", profile="timed")),
        (r"measured GPUs in # of #", in_range(profile="measured")),
        (r"DeepSeek-R1 in # of #", in_range("deepseek")),
        (r"MI355X is at # since its MXFP4 weights", over_best("Offline", "MI355X")),
        (r"Arc Pro B60, int4 \| #, # \|", over_best("Offline", "Arc")),
        ("on this card it is at #", over_best("Offline", "RTX", "llama2")),
        (r"L40S \| # \|", over_best("Offline", "L40S")),
        (r"DeepSeek-R1 \| # to # \|", lambda t: span(over_best("Offline", "", "deepseek")(t))),
        (r"DeepSeek-R1, Server \| # to # \|", lambda t: span(over_best("Server", "", "deepseek")(t))),
        (r"MI300X, Interactive \| # \|", over_best("Interactive", "MI300X")),
        (
            "planned at # of the best on MI300X and # on MI325X",
            lambda t: [over_best("Offline", gpu)(t)[0] for gpu in ("MI300X", "MI325X")],
        ),
    ),
    *_of(
        "faq.md",
        "mlperf totals",
        (
            "differs by #% from the best Offline",
            lambda t: [number(row["mape"]) for row in t.where("^Offline") if row["profile"] == "all"],
        ),
    ),
    *_of(
        "accuracy.md",
        "static batches",
        ("TensorRT-LLM is off by #% on", batches("all", "trtllm", "mape")),
        ("vLLM is off by #%, nearly", batches("all", "vllm", "mape")),
        ("on H100, #% too fast", batches("H100-SXM-80GB", "vllm", "bias")),
    ),
    *_of(
        "accuracy.md",
        "left_out",
        ("hold: #% of the times", cells(("all operators", "covered"), scale=100)),
        ("the mean error held #%, and", cells(("all operators", "covered by mean"), scale=100)),
        (
            "#% of the rates of # plans, where it held #%",
            lambda t: [
                100 * t["all plans", "covered"],
                sum(t.column("count", "^plans:")),
                100 * t["all plans", "covered by mean"],
            ],
        ),
        (
            "# of # hold nine in ten",
            lambda t: [sum(number(r["covered"]) >= 0.9 for r in operators(t)), len(operators(t))],
        ),
        ("the others hold #% of their times", covered_elsewhere),
        (
            "# have it together",
            lambda t: [sum("pcie" not in r["name"] and "transfer" not in r["name"] for r in operators(t))],
        ),
    ),
    *_of(
        "reliability.md",
        "soak hour",
        ("memory is #% above", lambda t: [100 * (t["60 min", "MiB"] / t["10 min", "MiB"] - 1)]),
        ("Calm p99 is # to # ms, and # to # ms in the # rows", calm),
        (r"and # of those that had piled up", lambda t: [sum(map(int, re.findall(r"(\d+) failed", str(t.rows))))]),
    ),
    *_of(
        "cost-model.md",
        "staging",
        ("for decoding is #% of it too large in the median", cells((f"{DECODE}: error", "p50"), scale=100)),
        ("in the worst twentieth by #%", cells((f"{DECODE}: error", "p5"), scale=-100)),
        ("hold #% less than planned", cells(("prefill, at the planned utilisation: error", "p50"), scale=100)),
        ("it is #% too small", cells(("decode, always waiting: error", "p50"), scale=-100)),
    ),
    *_of(
        "profiles.md",
        "profiles other sources",
        ("differ from the fits by #% to #%", lambda t: span(t.column("MAPE"))),
    ),
    *_of(
        "profiles.md",
        "profiles past increments",
        (r"predicts # times \(median\)", lambda t: [number(t.rows[0]["median predicted / measured"])]),
        ("is off by #% of the chunk's", lambda t: [number(t.rows[0]["mean error of the chunk's time"])]),
        ("on average, over # chunks", lambda t: [number(t.rows[0]["chunks"])]),
    ),
    *_of(
        "profiles-modelled.md",
        "profiles used errors",
        ("#% for dense layers and attention, and", cells(("A40", "prefill_attention"))),
        ("and #% for all-reduces over PCIe", cells(("RTX-A6000", "all_reduce"))),
    ),
    *_of(
        "profiles-modelled.md",
        "modelled relatives",
        (
            "FLOPs take # times Ampere's share",
            lambda t: [number(r["FLOPs take"].removesuffix("x")) for r in t.where("^Pascal$")],
        ),
    ),
]
