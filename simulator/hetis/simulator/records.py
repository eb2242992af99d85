"""The requests of a simulation as rows of a file."""

from __future__ import annotations

import csv
import io
import math

import numpy as np

from hetis.simulator.values import FloatArray, Run

CSV_COLUMNS = (
    "id", "arrival_s", "prompt_tokens", "output_tokens", "replica", "admitted_s", "first_token_s", "finished_s",
    "ttft_s", "tpot_s", "end_to_end_s", "preemptions", "moved_bytes",
)  # fmt: skip


def requests_csv(run: Run) -> str:
    """Return one row per request that arrived, with times to the microsecond; a cell is empty if it never happened.

    ``arrival_s``, ``prompt_tokens`` and ``output_tokens`` make the file a trace that can be replayed.
    """
    later_tokens = np.where(run.output_tokens > 1, run.output_tokens - 1, math.nan)
    columns = (
        run.id.tolist(), _times(run.arrival_s), run.prompt_tokens.tolist(), run.output_tokens.tolist(),
        [replica if replica >= 0 else "" for replica in run.replica.tolist()], _times(run.admitted_s),
        _times(run.first_token_s), _times(run.finished_s), _times(run.first_token_s - run.arrival_s),
        _times((run.finished_s - run.first_token_s) / later_tokens), _times(run.finished_s - run.arrival_s),
        run.preemptions.tolist(), [f"{moved:.0f}" for moved in run.moved_bytes.tolist()],
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()


def _times(values_s: FloatArray) -> list[str]:
    return [f"{value_s:.6f}" if math.isfinite(value_s) else "" for value_s in values_s.tolist()]
