"""What each rung of complexity is worth on fleets of many kinds, which one `place` plans by default, and the time.

    python -m benchmarks.rungs [--quick] [--json] [--markdown] [--only TEXT]

A row is one fleet and model with ``hetis-plan place`` as it comes, in a process of its own: per rung the planned
requests/s and the share that is left without the worst node (empty: nothing better than the rung below), the rung that
is planned, how many of the export targets carry it, what simulated traffic keeps of it, and the user seconds of the
whole command. ``survives`` is what ``--survive node`` leaves after any loss, of ``of`` requests/s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import rows
from benchmarks.measuring.placing import Case, placed
from benchmarks.measuring.rows import Row

LENGTHS = "4000/500"


CASES = (
    Case(((4, 8, "A100-SXM-80GB"), (8, 4, "L40S"), (16, 2, "RTX-3090"), (8, 4, "L4"), (8, 4, "V100-PCIe-32GB")),
         "Llama-2-70B"),
    Case(((8, 8, "H100-SXM-80GB"), (20, 8, "A100-SXM-40GB"), (30, 4, "L4"), (8, 4, "V100-PCIe-32GB")),
         "Llama-3.1-70B"),
    Case(((8, 8, "H100-SXM-80GB"), (20, 8, "A100-SXM-40GB"), (30, 4, "L4"), (8, 4, "V100-PCIe-32GB")),
         "Qwen3-235B-A22B"),
    Case(((2, 8, "A100-SXM-40GB"), (4, 4, "A10G"), (2, 8, "L4")), "Llama-3.1-8B"),
    Case(((2, 8, "H200-SXM-141GB"), (2, 8, "H100-SXM-80GB")), "DeepSeek-R1"),
    Case(((10, 4, "L4"), (1, 8, "H100-SXM-80GB")), "Llama-3.1-8B"),
    Case(((4, 8, "H100-SXM-80GB"),), "Llama-3.1-70B"),
    Case(((16, 1, "L4"),), "Llama-3.1-8B"),
    Case(((8, 8, "A100-SXM-80GB"),), "Qwen2.5-32B", LENGTHS),
    Case(((2, 8, "H100-SXM-80GB"), (4, 4, "L40S")), "Qwen3-32B", LENGTHS),
    Case(((1, 4, "RTX-3090"), (1, 2, "RTX-4090")), "Llama-3.1-70B", "1024/256", ("--weights", "awq-int4")),
    Case(((1, 2, "RTX-4090"),), "Llama-3.1-8B", "1024/256"),
    Case(((4, 8, "H200-SXM-141GB"),), "DeepSeek-V3"),
    Case(((2, 8, "A100-SXM-80GB"), (4, 8, "V100-SXM2-32GB")), "Llama-3.1-70B", LENGTHS),
    Case(((1, 8, "MI300X-192GB"), (1, 8, "H100-SXM-80GB")), "Llama-3.1-70B"),
    Case(((2, 2, "H100-SXM-80GB"), (4, 4, "P100-PCIe-12GB")), "Qwen2.5-32B", "8000/300"),
)  # fmt: skip
RUNGS = ("node", "pipelines", "apart", "workers")


def main() -> None:
    arguments = rows.parser("benchmarks.rungs", __doc__).parse_args()
    cases = [case for case in CASES if arguments.only in case.name]
    rows.show(measured(cases[-2:] if arguments.quick else cases), arguments, name="rungs")


def measured(cases: Sequence[Case]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            yield _row(case, case.file(Path(folder) / f"{number}.json"))


def _row(case: Case, file: str) -> Row:
    asked = ("-c", file, "-m", case.model, "-w", case.workload, *case.options)
    plan, user_s = placed(*asked)
    survivor, _ = placed(*asked, "--survive", "node", "--no-verify")
    found: dict[str, Any] = {"name": case.name, "requests": case.workload}
    rungs = {} if plan is None else {one["name"]: one for one in plan["inputs"].get("rungs", ())}
    for name in RUNGS:
        one = rungs.get(name, {})
        is_own = one.get("value") is not None and one["of"] == name
        found[name] = round(one["rate_rps"], 2) if is_own else None
        found[f"{name} left %"] = round(100.0 * one["left_rps"] / one["rate_rps"]) if is_own else None
    chosen: dict[str, Any] = next((one for one in rungs.values() if one["is_chosen"]), {})
    verified = {} if plan is None else plan["inputs"].get("verification") or {}
    kept = None if survivor is None else survivor["inputs"].get("survives_rps")
    return {
        **found,
        "planned": chosen.get("name", "none"),
        "exports": len(chosen.get("targets") or ()),
        "keeps": None if not verified.get("kept_rps") else round(verified["kept_rps"], 2),
        "survives": None if kept is None else round(kept, 2),
        "of": None if survivor is None else round(survivor["result"]["value"], 2),
        "user s": round(user_s, 1),
    }


if __name__ == "__main__":
    main()
