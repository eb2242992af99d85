"""Errors that AISimulate publishes, beside those of `benchmarks.accuracy.silicon`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring.rows import Row

# AISimulate's accuracy page (ai-dynamo/aisimulate 0.12, September 2026, docs/e2e-accuracy): 728 points of InferenceX.
AISIMULATE_TPOT = {"DeepSeek-R1": 0.182, "gpt-oss": 0.44, "MiniMax-M2.5": 0.123, "Qwen3.5": 0.22}


def beside_aisimulate(groups: Sequence[Row]) -> list[Row]:
    """Return our errors of the models with points that AISimulate publishes, over GPUs and engines, and its own."""
    found = list[Row]()
    for model, theirs in AISIMULATE_TPOT.items():
        ours = [row for row in groups if str(row["model"]).startswith(model)]
        if not ours:
            continue
        count = [int(str(row["n"])) for row in ours]
        mean = {
            name: sum(n * float(str(row[name])) for n, row in zip(count, ours, strict=True)) / sum(count)
            for name in ("tpot_mape", "ttft_mape")
        }
        found.append({"model": model, "n": sum(count), **mean, "aisimulate_tpot_mape": theirs})
    return found
