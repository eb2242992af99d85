"""Splitwise's end-to-end table (Mutinifni/splitwise-sim, MIT): prompt and token times of a whole engine."""

from __future__ import annotations

from hetis.formats import catalogue
from hetis.formats.measurements import MeasuredBy, MeasuredOp
from hetis.profiler.importers.collecting import Collection
from hetis.profiler.importers.gpu_names import gpu_name
from hetis.profiler.importers.reading import Rows, Sheet, require

_COUNTS = {
    "tp": "tensor_parallel",
    "batch": "batch_size",
    "prompt_tokens": "prompt_size",
    "output_tokens": "token_size",
}
_FORMS = {"end-to-end times": ("model", "hardware", *_COUNTS.values(), "prompt_time_ms", "token_time_ms")}


def read(sheet: Sheet, into: Collection) -> None:
    """Add two rows, prompt and token, for each row of the table."""
    require(sheet, _FORMS)
    rows = Rows(sheet)
    for index in rows:
        gpu = gpu_name(rows, index, "hardware")
        model = _model(rows, index)
        if gpu is None or model is None:
            continue
        host = "power-capped" if rows.text(index, "hardware").endswith("-pcap") else ""
        by = MeasuredBy(
            tool="Mutinifni/splitwise-sim", engine="vLLM", engine_version="2023", source="data/profiles",
            licence="MIT", host=host,
        )  # fmt: skip
        counts = {name: rows.count(index, column) for name, column in _COUNTS.items()}
        for phase in ("prompt", "token"):
            column = f"{phase}_time_ms"
            seconds = rows.seconds(index, column, unit_s=1e-3)
            into.add(gpu, by, MeasuredOp.E2E, "engine", (rows, index, column),
                     {**counts, "model": model, "phase": phase, "seconds": seconds})  # fmt: skip
    rows.finish()


def _model(rows: Rows, index: int) -> str | None:
    text = rows.text(index, "model")
    try:
        return catalogue.find_model(text).model.name
    except catalogue.UnknownNameError as error:
        rows.refuse(index, "model", str(error))
        return None
