"""What pools for classes of requests by prompt length keep beside a plan without, on fleets and traffic of many kinds.

    python -m benchmarks.classes [--quick] [--json] [--markdown] [--only TEXT]

A row is ``hetis-plan place --classes auto --worth 5%``, in a process of its own: the requests/s by the model without
classes and with those of the best value, and what both keep in simulation, with the router that each needs: as
planned, with longer prompts (the longest tenth 1.5 times as frequent, the shorter half 0.75 times), and in bursts (gaps
with a coefficient of variation of 2). ``cut`` is where classes are cut, and ``pays`` the class whose p95 TTFT is
longer, with the ratio; without figures no plan with pools has a better value.

Traffic is a trace's lengths, or those of azure_conv_2023 with a tenth of longbench_lengths (``chat and documents``);
with ``own limits`` the short class has a TTFT limit of a fourth of the other's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import rows
from benchmarks.measuring.placing import Case, placed
from benchmarks.measuring.rows import Row
from hetis.formats.documents import load_workload, to_data

CHAT, DOCUMENTS, BOTH, LIMITED = "azure_conv_2023", "longbench_lengths", "chat and documents", "own limits"
LONG_TTFT_S = 5.0  # of traffic with documents; chat has the command's limit
PART = 0.1  # of documents in `BOTH`
BOUND = 4096  # tokens of the short class with a limit of its own
FLEETS = (
    ((1, 2, "H100-SXM-80GB"), (1, 2, "A100-PCIe-80GB"), (2, 4, "L4"), (2, 2, "RTX-3090")),
    ((1, 2, "H100-SXM-80GB"), (2, 4, "L4")),
    ((1, 2, "A100-SXM-80GB"), (1, 4, "L40S")),
    ((1, 4, "A100-SXM-80GB"),),
)
MODEL = "Llama-3.1-8B"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of a row, with the limit on their TTFT; None: the command's."""

    name: str
    ttft_s: float | None = LONG_TTFT_S

    def file(self, folder: Path) -> str:
        """Return the trace's name, or write the traffic as a Workload file and return its path."""
        if self.name in (CHAT, DOCUMENTS):
            return self.name
        parts = [to_data(load_workload(name), self_contained=True) for name in (CHAT, DOCUMENTS)]
        shares = (1.0 - PART, PART)
        bins = [
            {**one, "weight": one["weight"] * share / sum(each["weight"] for each in part["histogram"])}
            for part, share in zip(parts, shares, strict=True)
            for one in part["histogram"]
        ]
        document = {**parts[0], "name": self.name, "histogram": bins, "rate_rps": None}
        if self.name == LIMITED:
            short = {"name": "short", "max_prompt_tokens": BOUND, "ttft": f"{LONG_TTFT_S / 4}s"}
            document["classes"] = [short, {"name": "long"}]
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}), "utf-8")
        return str(path)


# Of each fleet what tells most: the steady chat of azure_conv_2023 alone gains nothing anywhere.
CASES = (
    (0, Traffic(DOCUMENTS)), (0, Traffic(BOTH)), (0, Traffic(LIMITED)),
    (1, Traffic(DOCUMENTS)), (1, Traffic(BOTH)),
    (2, Traffic(BOTH)), (2, Traffic(CHAT, None)),
    (3, Traffic(BOTH)),
)  # fmt: skip


def main() -> None:
    arguments = rows.parser("benchmarks.classes", __doc__).parse_args()
    cases = [(Case(FLEETS[number], MODEL), traffic) for number, traffic in CASES]
    cases = [(case, traffic) for case, traffic in cases if arguments.only in f"{case.name}, {traffic.name}"]
    rows.show(measured(cases[:1] if arguments.quick else cases), arguments, name="classes")


def measured(cases: Sequence[tuple[Case, Traffic]]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for number, (case, traffic) in enumerate(cases):
            file = case.file(Path(folder) / f"{number}.json")
            limit = () if traffic.ttft_s is None else ("--ttft", f"{traffic.ttft_s:g}s")
            cut = () if traffic.name == LIMITED else ("--classes", "auto")
            asked = ("-c", file, "-m", case.model, "-w", traffic.file(Path(folder)), *limit)
            without, _ = placed(*asked, "--classes", "none", "--no-verify")
            found, user_s = placed(*asked, *cut, "--worth", "5%")
            yield _row(case, traffic, without, found, user_s)


def _row(
    case: Case, traffic: Traffic, without: dict[str, Any] | None, found: dict[str, Any] | None, user_s: float
) -> Row:
    record = {} if found is None else found["inputs"]
    planned = None if without is None else without["result"]["value"]
    kept = {one["traffic"]: one for one in record.get("classes_kept", ())}
    usual, longer, bursts = (kept.get(name, {}) for name in ("as planned", "longer prompts", "bursts"))
    return {
        "name": f"{case.name}, {traffic.name}",
        "planned": _rounded(planned),
        "with classes": _rounded(record.get("classes_value")),
        "gain %": _gain(planned, record.get("classes_value")),
        "keeps": _rounded(usual.get("without_rps")),
        "keeps with": _rounded(usual.get("with_rps")),
        "kept gain %": _gain(usual.get("without_rps"), usual.get("with_rps")),
        "longer prompts %": _gain(longer.get("without_rps"), longer.get("with_rps")),
        "bursts %": _gain(bursts.get("without_rps"), bursts.get("with_rps")),
        "cut": record.get("classes_cut") if kept else None,
        "pays": _pays(record.get("classes_ttft", ())),
        "user s": round(user_s, 1),
    }


def _pays(latencies: Sequence[dict[str, Any]]) -> str | None:
    """Return the class whose TTFT grows most, and by what ratio; None: no class's does."""
    known = [one for one in latencies if one["without_s"] and one["with_s"]]
    worst = max(known, key=lambda one: one["with_s"] / one["without_s"], default=None)
    if worst is None or worst["with_s"] <= worst["without_s"]:
        return None
    return f"{worst['name']} {worst['with_s'] / worst['without_s']:.2f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _gain(before: float | None, after: float | None) -> float | None:
    return None if not before or after is None else round(100.0 * (after / before - 1.0), 1)


if __name__ == "__main__":
    main()
