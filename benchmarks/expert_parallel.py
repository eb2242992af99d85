"""Waits of copies that share their experts: for the rank with the most to do, and for the exchange of tokens.

    python -m benchmarks.expert_parallel [--quick] [--json] [--only TEXT] [--data FOLDER]

Both are rules of the cost model (``docs/cost-model.md``, "Expert parallelism"), compared here with the tables from
which they were derived: aiconfigurator's fused experts and collectives on A100, H100 and L40S.

*busiest of R ranks*: R ranks have whole experts, and tokens prefer some (``power_law_1.01``). ``measured`` is the time
of the busiest rank over that of a rank with a slice of every expert, which has exactly its share; ``rule`` is R to the
power of the exponent. Only iterations of at least 4,096 tokens count: in shorter ones reading weights takes longest,
and all ranks read about the same number of them.

*exchange among R ranks*: ``measured`` is an all-gather and a reduce-scatter over two all-reduces of half the message,
all by NCCL; ``rule`` is 1. ``p10`` and ``p90`` are over shapes and sizes.

*exponent*: the least squares of logarithms over all points of the first rule, and the one in use.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from hetis.profiler.importers.reading import read_sheet
from hetis.solver.cost import EXPERT_IMBALANCE

DATA = Path(__file__).parents[2] / "shared" / "data" / "profiles"
GPUS = {"A100-SXM-80GB": "aic_a100_sxm", "H100-SXM-80GB": "aic_h100_sxm", "L40S": "aic_l40s"}
RANKS = (2, 4, 8)
LEAST_TOKENS = 4096  # tokens per iteration; in iterations this long, experts compute for longer than they read


class _Experts(NamedTuple):
    """A measured fused expert layer: tokens and sizes, the ranks that slice experts and that have whole ones."""

    shape: tuple[int, ...]
    sliced: int
    whole: int
    distribution: str


def main() -> None:
    """Print a row per rule, GPU type and number of ranks."""
    parser = rows.parser("benchmarks.expert_parallel", __doc__)
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help="where the tables are")
    arguments = parser.parse_args()
    missing = [path for path in paths(arguments.data) if not path.is_file()]
    if missing:
        message = f"{missing[0]}: no such file; --data says where the tables are"
        if not arguments.quick:
            raise SystemExit(message)
        print(message, file=sys.stderr)  # --quick must run everywhere, but we may not ship the tables
        return
    found = (row for row in all_rows(arguments.data) if arguments.only in str(row["name"]))
    rows.show(found, arguments, name="expert_parallel")


def paths(folder: Path) -> list[Path]:
    """Return the files of the tables."""
    return [folder / f"{name}_{what}.csv.gz" for name in GPUS.values() for what in ("moe", "comm")]


def all_rows(folder: Path) -> Iterator[Row]:
    """Yield the rows of both rules."""
    logs = list[tuple[float, float]]()
    for gpu, name in GPUS.items():
        busiest, exchanges = (
            busiest_ratios(folder / f"{name}_moe.csv.gz"),
            exchange_ratios(folder / f"{name}_comm.csv.gz"),
        )
        for what, ratios, exponent in (("busiest of", busiest, EXPERT_IMBALANCE), ("exchange among", exchanges, 0.0)):
            for ranks in RANKS:
                if ratios is busiest:
                    logs += [(math.log(ranks), math.log(ratio)) for ratio in busiest.get(ranks, ())]
                if ranks in ratios:
                    yield row_of(f"{gpu}: {what} {ranks} ranks", ratios[ranks], rule=ranks**exponent)

    x, y = np.array(logs).T
    fitted = round(float(x @ y / (x @ x)), 3)
    measured: Row = {"points": len(logs), "p10": None, "measured": fitted, "p90": None, "rule": EXPERT_IMBALANCE}
    yield {"name": "exponent", **measured}


def row_of(name: str, ratios: list[float], *, rule: float) -> Row:
    """Return how measured ratios spread around a rule."""
    low, middle, high = (round(float(value), 3) for value in np.quantile(ratios, (0.1, 0.5, 0.9)))
    return {"name": name, "points": len(ratios), "p10": low, "measured": middle, "p90": high, "rule": round(rule, 3)}


def busiest_ratios(path: Path) -> dict[int, list[float]]:
    """Return, by number of ranks, the time of the busiest with whole experts over that of one with slices of all."""
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts")
    table, times = read_sheet(path), dict[_Experts, float]()
    for row in table:
        shape = tuple(row.count(name) or 0 for name in names)
        sliced, whole = row.count("moe_tp_size") or 0, row.count("moe_ep_size") or 0
        seconds = row.seconds("latency_ms", unit_s=1e-3)
        if seconds is not None:
            times[_Experts(shape, sliced, whole, row.text("distribution"))] = seconds
    table.finish()
    found = defaultdict[int, list[float]](list)
    for one, seconds in times.items():
        ranks, is_long = one.whole, one.shape[0] >= LEAST_TOKENS
        if one.sliced != 1 or ranks not in RANKS or one.distribution != "power_law_1.01" or not is_long:
            continue
        alike = [_Experts(one.shape, ranks, 1, name) for name in ("balanced", "power_law_1.01")]
        even_s = next((times[other] for other in alike if other in times), None)
        if even_s is not None:
            found[ranks].append(seconds / even_s)
    return found


def exchange_ratios(path: Path) -> dict[int, list[float]]:
    """Return, by ranks, the time of an all-gather and a reduce-scatter over two all-reduces of half the message."""
    table, times = read_sheet(path), dict[tuple[int, int, str], float]()
    for row in table:
        ranks, size = row.count("num_gpus"), row.count("message_elements")
        seconds = row.seconds("latency_ms", unit_s=1e-3)
        if ranks is None or size is None or seconds is None or not row.text("impl").startswith("nccl"):
            continue
        times[ranks, size, row.text("op_name")] = seconds
    table.finish()
    found = defaultdict[int, list[float]](list)
    for (ranks, size, name), gather_s in times.items():
        scatter_s, half_s = times.get((ranks, size, "reduce_scatter")), times.get((ranks, size // 2, "all_reduce"))
        if name == "all_gather" and scatter_s is not None and half_s is not None:
            found[ranks].append((gather_s + scatter_s) / (2 * half_s))
    return found


if __name__ == "__main__":
    main()
