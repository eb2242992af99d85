"""The memory of engines against what their users reported: GiB and tokens of KV, weights as loaded, failed starts.

    python -m benchmarks.accuracy.memory [--points FILE] [--json] [--only TEXT] [--quick] [--markdown]

A row of the table is one engine at its start, with its settings and what its log said. Rows from further public logs
are in benchmarks/accuracy/kv_rooms.csv. A row that names no version of its engine has that of its source: an issue of
vLLM was opened while some version was the latest. A range counts as what it is nearest to.

Errors are predicted / reported - 1; of KV that is missing (a failed start), the difference as a share of the GPU.
``assumed`` says what a row does not report. ``--markdown`` writes docs/accuracy.md.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.accuracy import published_points
from benchmarks.accuracy.published_points import FOLDER, NotPosedError
from benchmarks.measuring import rows
from benchmarks.measuring.rows import Cell, Row
from hetis.engines.gpus import reported_bytes
from hetis.engines.memory import (
    GIB,
    Start,
    default_start,
    kv_bytes_of_request,
    longest_context,
    memory_of,
    requests_in,
    room_of,
)
from hetis.engines.versions import Engine
from hetis.formats import catalogue
from hetis.formats.documents import load_model
from hetis.formats.errors import DocumentError
from hetis.formats.models import dtypes
from hetis.solver.cluster import GpuType
from hetis.solver.errors import HetisError
from hetis.solver.model import DraftShape, ModelSpec

POINTS = FOLDER / "kv_room.csv"
FURTHER = Path(__file__).parent / "kv_rooms.csv"
CONFIGS = (FOLDER.parent / "configs", Path(__file__).parents[2] / "tests" / "formats" / "huggingface")
COLUMNS = ("id", "gpu", "gpus", "model", "weights", "kv", "kv_gib_per_gpu", "source")
# Models of the same shape as one that is known, and those that only a config file describes.
SAME = {
    "Qwen3.6-27B": "Qwen/Qwen3.5-27B",
    "Qwen3.6-35B-A3B": "Qwen/Qwen3.5-35B-A3B",
    "DeepSeek-R1-Distill-Qwen-14B": "Qwen2.5-14B",
    "DeepSeek-R1-Distill-Qwen-7B": "Qwen/Qwen2.5-7B-Instruct",
    "DeepSeek-R1-Distill-Qwen-32B": "Qwen2.5-32B",
    "DeepSeek-R1-Distill-Llama-8B": "Meta-Llama-3.1-8B",
    "DeepSeek-R1-Distill-Llama-70B": "Meta-Llama-3.1-70B",
    "Llama-3.1-8B-Instruct": "Meta-Llama-3.1-8B",
    "Meta-Llama-3.1-8B-Instruct": "Meta-Llama-3.1-8B",
    "Meta-Llama-3-70B-Instruct": "Meta-Llama-3-70B",
    "Llama-3.3-70B-Instruct": "Llama-3.3-70B",
    "Qwen3-235B-A22B-Instruct-2507": "Qwen/Qwen3-235B-A22B",
    "Kimi-Dev-72B": "Qwen/Qwen2.5-72B-Instruct",
    "DeepSeek-V2-Lite-Chat": "deepseek-ai/DeepSeek-V2-Lite",
    "GLM-4.7": "zai-org/GLM-4.5",
    "Llama-3.1-70B-Instruct": "Meta-Llama-3.1-70B",
    "Llama-3.1-405B-Instruct": "Meta-Llama-3.1-405B",
}
_QUANTISED = re.compile(
    r"-(FP8(-dynamic)?|NVFP4|FP4|AWQ|GPTQ|INT4|INT8|MXFP4|W4A16|W8A8|quantized\.w\da\d+)(?=-|$)", re.IGNORECASE
)
# Numbers of vLLM's issues and pull requests, and the version that was the latest when they were opened.
_ISSUES = (
    *((6000, "0.5.0"), (6700, "0.5.3"), (8000, "0.5.5"), (8400, "0.6.1"), (10000, "0.6.3"), (10400, "0.6.4")),
    *((12000, "0.6.6"), (12500, "0.7.0"), (13000, "0.7.2"), (15000, "0.8.0"), (16500, "0.8.4"), (18500, "0.9.0")),
    *((21000, "0.9.2"), (21600, "0.10.0"), (23000, "0.10.1"), (26000, "0.11.0"), (29500, "0.11.2"), (30200, "0.12")),
    *((31000, "0.13"), (32000, "0.14"), (33300, "0.15"), (34500, "0.16"), (36000, "0.17"), (37500, "0.18")),
    *((39500, "0.19"), (41500, "0.20"), (42500, "0.21"), (43500, "0.22"), (46000, "0.23"), (47500, "0.24")),
    *((49000, "0.25"), (50500, "0.26"), (52500, "0.27"), (53900, "0.28"), (56000, "0.30"), (60000, "0.32")),
)
_MONTHS = (
    *((2024, 7, "0.5.3"), (2024, 9, "0.6.1"), (2024, 11, "0.6.4"), (2025, 2, "0.7.2"), (2025, 4, "0.8.4")),
    *((2025, 6, "0.9.0"), (2025, 7, "0.9.2"), (2025, 8, "0.10.1"), (2025, 10, "0.11.0"), (2025, 12, "0.12")),
    *((2026, 1, "0.14"), (2026, 2, "0.15"), (2026, 3, "0.17"), (2026, 4, "0.19"), (2026, 5, "0.21"), (2026, 6, "0.22")),
    *((2026, 7, "0.24"), (2026, 8, "0.26"), (2026, 9, "0.29"), (2026, 11, "0.32")),
)
_NAMES = (
    *("january", "february", "march", "april", "may", "june", "july", "august"),
    *("september", "october", "november", "december"),
)
UNKNOWN = "0.12"  # of the versions it may be, the one that leaves the least for KV
OTHERS_REQUESTS = 256  # vLLM's default on other GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A posed row: the engine's start, and what was reported of it."""

    name: str
    gpu: GpuType
    model: ModelSpec
    start: Start
    version: str
    context_tokens: int
    kv_gib: tuple[float, float] | None  # a range
    kv_tokens: int | None
    weights_gib: tuple[float, float] | None
    request: tuple[int, float] | None  # tokens of one request, and the GiB of KV that it needs
    starts: bool
    assumed: str


def main() -> None:
    """Print a row per report, what they come to, and the numbers of posed and skipped rows."""
    arguments = published_points.parser("benchmarks.accuracy.memory", __doc__, POINTS).parse_args()
    table = published_points.asked_rows(arguments, COLUMNS)
    if table is None:
        return
    if arguments.points == POINTS:
        table += published_points.read_rows(FURTHER, COLUMNS)
    found, skipped = list[Row](), Counter[str]()
    for row in table:
        if arguments.only not in row["id"]:
            continue
        try:
            found.append(result(pose(row)))
        except NotPosedError as error:
            skipped[str(error)] += 1
    covered = [*published_points.coverage("predicted", len(found), skipped)]
    if arguments.markdown:
        rows.keep("memory", [in_percent(row) for row in found])
    if arguments.json:
        for each in (*found, summary(found), *covered):
            print(json.dumps(each), flush=True)
        return
    print(rows.table([in_percent(row) for row in found]))
    print(rows.table([in_percent(summary(found))]))
    published_points.print_coverage(covered, "rows")


def pose(row: Mapping[str, str]) -> Report:
    """Return the report of a row. Raises NotPosedError with the reason if it cannot be predicted."""
    text, assumed = row.get("engine", ""), list[str]()
    engine = Engine.SGLANG if "sglang" in text.lower() else Engine.VLLM
    if "vllm" not in text.lower() and engine is Engine.VLLM:
        raise NotPosedError(f"the engine {text or 'is not given, and so'} is not known")
    version = row.get("version") or version_of(text, row["source"])
    if not version:
        version = UNKNOWN
        assumed.append(f"version {UNKNOWN}")
    try:
        gpu = catalogue.find_gpu(row["gpu"]).gpu
    except catalogue.UnknownNameError:
        raise NotPosedError(f"the GPU {row['gpu']} is not known") from None
    note = row.get("note", "")
    if "AITER" in note:
        raise NotPosedError("a vendor's build for AMD keeps a second copy of experts' projections")
    model = model_of(row)
    tp, stages = _whole(row, "tp") or _whole(row, "gpus") or 1, _whole(row, "pp") or 1
    rules = memory_of(engine, version)
    if "no prefix cache" in note:
        rules = replace(rules, spare_states=0)
    start = default_start(rules, gpu, tp=tp, stages=stages)
    tokens, requests = _whole(row, "max_num_batched_tokens"), _whole(row, "max_num_seqs")
    if requests == OTHERS_REQUESTS and requests < start.max_num_seqs and tokens == start.batched_tokens:
        requests = None  # filled in beside this GPU's own default of tokens
    if requests is None and engine is Engine.VLLM:
        assumed.append(f"{min(start.max_num_seqs, tokens or start.batched_tokens):,} requests, the default")
    utilisation = float(row["gpu_memory_utilization"]) if row.get("gpu_memory_utilization") else None
    request = re.search(r"one request of ([\d,]+) tokens needs ([\d.]+) GiB", note)
    return Report(
        name=row["id"],
        gpu=gpu,
        model=model,
        start=replace(
            start,
            batched_tokens=tokens or start.batched_tokens,
            max_num_seqs=requests or start.max_num_seqs,
            utilisation=utilisation,
            eager="eager" in note,
        ),
        version=version,
        context_tokens=_whole(row, "context") or model.max_position,
        kv_gib=_range(row.get("kv_gib_per_gpu", "")),
        kv_tokens=_whole(row, "kv_tokens"),
        weights_gib=_range(row.get("weights_gib_per_gpu", "")),
        request=None if request is None else (int(request[1].replace(",", "")), float(request[2])),
        starts="does not start" not in note,
        assumed="; ".join(assumed),
    )


def version_of(text: str, source: str) -> str:
    """Return the version of vLLM that a row means: its own, that of its month or its source's issue; empty: none."""
    if found := re.search(r"\d+\.\d+(\.\d+)?", text):
        return found[0]
    words = re.findall(r"[a-z]+|\d{4}", text.lower())
    if month := next((word for word in words if word in _NAMES), None):
        year = next((int(word) for word in words if word.isdecimal()), 0)
        at = (year, _NAMES.index(month) + 1, "~")
        return _MONTHS[max(bisect.bisect(_MONTHS, at) - 1, 0)][2]
    numbers = [int(n) for n in re.findall(r"\d{4,6}", source)] if "vllm-project/vllm" in source else []
    if numbers:
        return _ISSUES[max(bisect.bisect(_ISSUES, (numbers[0], "~")) - 1, 0)][1]
    return ""


def model_of(row: Mapping[str, str]) -> ModelSpec:
    """Return the model of a row in its precision. Raises NotPosedError if it is not known."""
    name = re.sub(r"\s*\(.*\)", "", row["model"]).strip()
    model = _known(name)
    wanted = {"awq": "awq-int4", "gptq": "gptq-int4"}.get(row["weights"].lower(), row["weights"].lower())
    if wanted in dtypes.PRECISIONS and wanted != "bf16" and model.weights != wanted:
        model = dtypes.with_precision(model, weights=wanted)
    if (kv := row["kv"].lower()) in dtypes.KV_PRECISIONS:
        model = dtypes.with_precision(model, kv=kv)
    if drafts := re.search(r"(\d+) drafted tokens", row.get("note", "")):
        model = replace(model, draft=DraftShape(tokens=int(drafts[1]), acceptance=0.7))
    return model


def _known(name: str) -> ModelSpec:
    plain = _QUANTISED.sub("", name)
    short = plain.rpartition("/")[2]
    names = (name, SAME.get(short, plain), plain, short)
    for each, folder, sep, end in itertools.product(names[:2], CONFIGS, ("--", "__"), ("", ".json")):
        if (path := folder / f"{each.replace('/', sep)}{end}").exists():
            return load_model(path)
    for each in names:
        try:
            return load_model(each)
        except DocumentError:
            continue
    raise NotPosedError(f"the model {name} is not known")


def result(report: Report) -> Row:
    """Return what is predicted of a report, beside it."""
    try:
        room = room_of(report.model, report.gpu, report.start)
        longest = longest_context(room, report.model, report.gpu, report.start)
    except HetisError as error:
        raise NotPosedError(str(error)) from None
    kv, context = room.kv_bytes / GIB, min(report.context_tokens, longest)
    tokens = int(requests_in(room, report.model, report.gpu, report.start, context) * context) if context else 0
    wanted_kv, found_kv = report.kv_gib, kv
    if report.request is not None:  # the KV of one request is compared
        length, gib = report.request
        wanted_kv = (gib, gib)
        found_kv = kv_bytes_of_request(
            report.model, length, report.start.rules, tp=report.start.tp, batched_tokens=report.start.batched_tokens,
            vendor=report.gpu.vendor,
        ) / GIB  # fmt: skip
    failed = not report.starts
    cells: dict[str, Cell] = {
        "report": report.name, "version": f"{report.start.rules.engine.value} {report.version}",
        "kv_gib": _shown(wanted_kv), "predicted_gib": round(found_kv, 2),
        "kv_error": _error(found_kv, wanted_kv, reported_bytes(report.gpu) / GIB),
        "kv_tokens": report.kv_tokens, "predicted_tokens": tokens if report.kv_tokens else None,
        "token_error": None if report.kv_tokens is None else _ratio(tokens, report.kv_tokens),
        "weights_gib": _shown(report.weights_gib),
        "predicted_weights": round(room.weight_bytes / GIB, 2) if report.weights_gib else None,
        "weight_error": _error(room.weight_bytes / GIB, report.weights_gib, 1.0),
        "failed_start": ("predicted" if longest < report.context_tokens else "missed") if failed else "",
        "assumed": report.assumed,
    }  # fmt: skip
    return cells


def summary(found: Sequence[Row]) -> Row:
    """Return the errors of all rows: medians of their sizes, and the most by which too much is predicted."""
    cells: dict[str, Cell] = {"report": "all", "n": len(found)}
    for key in ("kv_error", "token_error", "weight_error"):
        errors = [float(value) for row in found if isinstance(value := row[key], float)]
        cells |= {f"median_{key}": round(median(map(abs, errors)), 4) if errors else None}
        cells |= {f"most_{key}": round(max(errors), 4) if errors else None}
    starts = [row["failed_start"] for row in found if row["failed_start"]]
    cells["failed_starts"] = f"{starts.count('predicted')} of {len(starts)} predicted"
    return cells


def in_percent(row: Row) -> Row:
    """Return a row with its errors as percentages."""
    return {key: f"{v:+.1%}" if key.endswith("error") and isinstance(v, float) else v for key, v in row.items()}


def _whole(row: Mapping[str, str], key: str) -> int | None:
    text = (row.get(key) or "").replace(",", "").strip()
    return int(float(text)) if text else None


def _range(text: str) -> tuple[float, float] | None:
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    return (min(numbers), max(numbers)) if numbers else None


def _shown(limits: tuple[float, float] | None) -> str | None:
    return None if limits is None else " to ".join(f"{one:g}" for one in dict.fromkeys(limits))


def _error(value: float, limits: tuple[float, float] | None, whole: float) -> float | None:
    """Return the error against the nearest number of a range; of a missing amount, as a share of ``whole``."""
    if limits is None:
        return None
    nearest = min(max(value, limits[0]), limits[1])
    return _ratio(value, nearest) if nearest > 0 else round((value - nearest) / whole, 4)


def _ratio(value: float, wanted: float) -> float:
    return round(value / wanted - 1.0, 4)


if __name__ == "__main__":
    main()
