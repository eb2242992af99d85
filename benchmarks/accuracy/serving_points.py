"""Serving points measured by others, and how each is posed to the cost model, or why it cannot be.

A point is one row of aiconfigurator's table of real engines (``silicon_sample.csv``): the TTFT and TPOT of one replica
with a constant number of requests in flight. What a row does not state (the format of the KV cache, the tokens of an
iteration, how lengths vary) is taken from the scripts that InferenceX and the engines publish, by engine and never by
row.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.accuracy.published_points import NotPosedError
from benchmarks.accuracy.published_settings import Run, Settings, settings_elsewhere, settings_of, with_ranks
from hetis.formats import catalogue
from hetis.formats.models import dtypes
from hetis.formats.models.huggingface import model_from_config
from hetis.formats.positions import parse_text
from hetis.profiler.importers.reading import catalogue_name
from hetis.solver.cost import rank_shape
from hetis.solver.model import ModelSpec

CONFIGS = Path(__file__).parents[2] / "tests" / "formats" / "huggingface"  # published model configs
NODE_GPUS = 8  # GPUs per node in every system of the tables; a tensor-parallel group stays within a node
# SGLang computes prompts in separate iterations; the others mix them with decoding.
MIXES = {"vllm": True, "trtllm": True, "sglang": False}
DRIFT = 0.98  # `shortest` of equal lengths if prompts and decoding mix: requests that arrive together soon end apart
MOST = 10**7  # of any whole number of a row; tokens and requests of published runs are far fewer
ROUNDING = 3e-3  # relative difference between dumps of one measurement
WARM_DATE = "2026-01-21"  # when InferenceX's load generator began to warm engines up (its pull request 480)
LENGTH_RATIO = 0.8  # InferenceX draws lengths between this share of the stated length and all of it
_INFERENCEX = re.compile(r"db-dump|source_file=20\d\d-|source_file=qwen3.5")
_NAMED_RANKS, _NAMED_REQUESTS = re.compile(r"_tp(\d+)(?:_0)?_ep(\d+)"), re.compile(r"_c(\d+)_")
_QUANTISED_ENDING = re.compile(r"-(FP8|NVFP4|FP4|MXFP4)$", re.IGNORECASE)
_FORMATS = {"fp8": "fp8", "fp8_block": "fp8", "nvfp4": "nvfp4", "fp4": "nvfp4", "mxfp4": "mxfp4", "bf16": "bfloat16"}
COLUMNS = ("id", "backend", "model_path", "system", "mode", "isl", "osl", "silicon_ttft_ms", "silicon_tpot_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPoint:
    """A posed row: ``requests`` in flight on one replica of ``tp`` GPUs, or on each of ``copies`` with ``tp`` GPUs.

    Copies share their experts and iterate together (attention data parallelism).
    """

    row: Mapping[str, str]
    gpu: str
    engine: str
    label: str  # model name as in the row, without the organisation
    model: ModelSpec
    mode: str
    tp: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    shortest: float  # lengths are uniform between this share of the stated ones and all of it
    settings: Settings
    has_whole_experts: bool  # whether each rank has some whole experts instead of slices of all
    copies: int = 1
    ttft_s: float
    tpot_s: float

    @property
    def decoding(self) -> float:
        """Return the number of concurrently decoding requests, by Little's law from the measured times."""
        decode_s = self.output_tokens * self.tpot_s
        return self.requests * decode_s / (self.ttft_s + decode_s)

    @property
    def source(self) -> str:
        """Return the source of the load: InferenceX, or NVIDIA with its own generator through Dynamo."""
        return "InferenceX" if self.shortest == LENGTH_RATIO else "NVIDIA"

    @property
    def is_calibration(self) -> bool:
        """Return whether an engine's host times were fitted to this point; see `hetis.profiler.engines`."""
        return self.gpu == "H100-SXM-80GB" and self.label in ("Qwen3-32B", "Llama-3.1-8B-Instruct")

    @property
    def is_warmed(self) -> bool:
        """Return whether requests found an engine that had been warmed up: not in InferenceX's runs before `WARM_DATE`.

        In those, kernels are compiled while the first requests wait.
        """
        return self.source != "InferenceX" or not "" < _date(self.row) < WARM_DATE

    @property
    def kind(self) -> str:
        return "dense" if self.model.experts is None else "moe"


def posed(rows: list[dict[str, str]]) -> list[ServingPoint | tuple[dict[str, str], str]]:
    """Return the point of every row, or the row and why it is not posed.

    A measurement in several dumps, which round differently, is posed once. If two published scripts match a row, one of
    them with drafts, the row needs a counterpart: the faster of the two ran with drafts.
    """
    found = list[ServingPoint | tuple[dict[str, str], str]]()
    unsettled = defaultdict[tuple[object, ...], list[tuple[int, tuple[ServingPoint, ...]]]](list)
    seen = defaultdict[tuple[str, ...], list[tuple[float, float]]](list)
    for row in rows:
        try:
            points = pose(row)
        except NotPosedError as error:
            found.append((row, str(error)))
            continue
        point = points[0]
        measured = seen[row["system"], row["backend"], point.label, row["isl"], row["osl"]]
        if any(_is_same((point.ttft_s, point.tpot_s), other) for other in measured):
            found.append((row, "the same measurement as a row before"))
            continue
        measured.append((point.ttft_s, point.tpot_s))
        if len(points) > 1:
            load = point.requests, point.prompt_tokens, point.output_tokens
            run = point.gpu, point.label, row["precision"], _image(row), point.tp, point.has_whole_experts
            unsettled[(*run, *load)].append((len(found), points))
        found.append(point)
    for alike in unsettled.values():
        alike.sort(key=lambda item: item[1][0].tpot_s)
        for (place, points), choice in zip(alike, (-1, *(None,) * (len(alike) - 2), 0), strict=False):
            if choice is not None and len(alike) > 1:
                found[place] = points[choice]
            else:
                found[place] = dict(points[0].row), "two scripts ran what the row names, one of them with drafts"
    return found


def _is_same(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(abs(a / b - 1.0) < ROUNDING for a, b in zip(one, other, strict=True))


def pose(row: Mapping[str, str]) -> tuple[ServingPoint, ...]:
    """Return the point of one row: two if it may have been run without drafts or with them.

    Raises:
        NotPosedError: the cost model cannot express it.
    """
    if row["mode"] != "agg":
        raise NotPosedError("prefill and decode on GPUs of their own: the numbers of workers are not recorded")
    if row["backend"] not in MIXES:
        raise NotPosedError(f"the settings of engine {row['backend']} are not known")
    tp, copies = _ranks(row)
    requests = _requests(row, copies)
    if _whole(row, "pp_size", 1) > 1:
        raise NotPosedError("pipeline stages: the layers of each are not recorded")
    if tp * copies > NODE_GPUS:
        raise NotPosedError(f"tensor parallelism over more than a node of {NODE_GPUS} GPUs")
    gpu = catalogue_name(row["system"])
    if gpu is None:
        raise NotPosedError(f"the catalogue does not know the GPU {row['system']}")
    model, label = _model(row), row["model_path"].rpartition("/")[2]
    if rank_shape(model, tp, copies) is None:
        raise NotPosedError("the model's heads cannot be shared by so many ranks")
    prompt_tokens, output_tokens = _whole(row, "isl"), _whole(row, "osl")
    experts = 1 if model.experts is None else _whole(row, "moe_ep_size", 1)
    inferencex = _INFERENCEX.search(row.get("silicon_data_source", "")) is not None
    choices: tuple[Settings, ...] = (settings_elsewhere(row["backend"], row.get("silicon_data_source", "")),)
    if inferencex:
        run = Run(
            engine=row["backend"], image=_image(row), date=_date(row), model=label, gpu=gpu, precision=row["precision"],
            tp=tp * copies, experts=experts, copies=copies, requests=requests, prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )  # fmt: skip
        run = with_ranks(run)
        choices, experts = settings_of(run), run.experts
        tp, copies, requests = run.tp // run.copies, run.copies, run.requests
    drift = DRIFT if MIXES[row["backend"]] else 1.0
    fields: dict[str, Any] = {
        "row": row, "gpu": gpu, "engine": row["backend"], "label": label, "mode": row["mode"], "tp": tp,
        "requests": requests, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens,
        "shortest": LENGTH_RATIO if inferencex else drift, "copies": copies,
        "has_whole_experts": model.experts is not None and experts > 1,
        "ttft_s": _seconds(row, "silicon_ttft_ms"), "tpot_s": _seconds(row, "silicon_tpot_ms"),
    }  # fmt: skip
    return tuple(
        ServingPoint(model=replace(model, kv_bytes=1.0) if settings.has_fp8_kv else model, settings=settings, **fields)
        for settings in choices
    )


def _model(row: Mapping[str, str]) -> ModelSpec:
    """Return the model with weights and KV cache in the formats of the row."""
    named = _named_model(row["model_path"])
    asked = {_FORMATS.get(row.get(column, ""), row.get(column, "")) for column in ("gemm_quant_mode", "moe_quant_mode")}
    asked = {name for name in asked if name and name != "bfloat16"}
    if not asked and row.get("precision") in ("fp8", "fp4"):
        asked = {_FORMATS[row["precision"]]}
    if unknown := [name for name in asked if name not in dtypes.BYTES_PER_PARAMETER]:
        raise NotPosedError(f"weights of format {unknown[0]}")
    if len(asked) > 1:
        raise NotPosedError("experts and other weights in two formats")
    if not asked:
        plain = row.get("precision") == "bf16" or named.weight_bytes >= 2
        return dtypes.with_weight_bytes(named, 2.0) if plain else named
    (weights,) = asked
    if "gpt-oss" in named.name:  # only its experts are quantised (MXFP4), whatever engines call it
        return replace(named, kv_bytes=1.0 if row["backend"] == "trtllm" else 2.0)
    sized = dtypes.with_weight_bytes(named, dtypes.layer_weight_bytes(f"bfloat16+{weights}", named))
    return replace(sized, kv_bytes=1.0 if _has_fp8_kv(row) else 2.0)


def _has_fp8_kv(row: Mapping[str, str]) -> bool:
    """Return whether published scripts use FP8 KV: always for TensorRT-LLM, for Llama and DeepSeek elsewhere."""
    return row["backend"] == "trtllm" or re.search(r"Llama|DeepSeek", row["model_path"]) is not None


@cache
def _named_model(name: str) -> ModelSpec:
    short = _QUANTISED_ENDING.sub("", name)
    candidates = [short] if short == name else [short, short.rpartition("/")[2]]
    for candidate in candidates:
        try:
            return catalogue.find_model(candidate).model
        except catalogue.UnknownNameError:
            continue
    path = CONFIGS / f"{short.replace('/', '__')}.json"
    if not path.is_file():
        raise NotPosedError(f"the catalogue does not know the model {name}")
    text = path.read_text(encoding="utf-8")
    _, source = parse_text(text, path.name)
    return model_from_config(json.loads(text), source, name=short)


def _ranks(row: Mapping[str, str]) -> tuple[int, int]:
    """Return the tensor-parallel ranks of a copy, and the copies that share their experts.

    Some dumps multiply parallel sizes twice where attention is data-parallel (the same measurement has 8 copies in one
    of them and 64 in another): the run's own name has the GPUs, and each of them is a copy. Without such a name
    ``tp_size`` is taken for the GPUs.
    """
    tp = _whole(row, "tp_size")
    if _whole(row, "attention_dp_size", 1) == 1:
        return tp, 1
    named = _NAMED_RANKS.search(row["id"])
    gpus, experts = (int(named[1]), int(named[2])) if named else (tp, tp)
    if experts != gpus:
        raise NotPosedError("attention data parallelism beside experts that all ranks slice is no stage shape")
    return 1, gpus


def _requests(row: Mapping[str, str], copies: int) -> int:
    """Return the requests in flight on each copy; the source's other number counts all replicas of a run."""
    if copies > 1:
        named = _NAMED_REQUESTS.search(row["id"])
        if named is None:
            raise NotPosedError("requests in flight are not recorded")
        return max(1, int(named[1]) // copies)
    if row.get("batch_size"):
        return _whole(row, "batch_size")
    found = re.search(r"silicon_concurrency=(\d+)", row.get("silicon_data_source", ""))
    if found is None:
        raise NotPosedError("requests in flight are not recorded")
    return int(found[1])


def _image(row: Mapping[str, str]) -> str:
    """Return the tag of the engine's container, or nothing; some dumps name the container without ``image=``."""
    source = row.get("silicon_data_source", "")
    found = re.search(r"(?:image=|; )[\w./#-]*(?:sglang|vllm-openai|release):([^;\s]+)", source)
    return found[1] if found else ""


def _date(row: Mapping[str, str]) -> str:
    found = re.search(r"measured=(\d{4}-\d\d-\d\d)", row.get("silicon_data_source", ""))
    return found[1] if found else ""


def _whole(row: Mapping[str, str], column: str, default: int | None = None) -> int:
    text = row.get(column, "")
    if not text and default is not None:
        return default
    try:
        number = int(float(text))
    except (ValueError, OverflowError):  # not a number, or infinite
        number = 0
    if not 1 <= number <= MOST:
        raise NotPosedError(f"{column} is not recorded")
    return number


def _seconds(row: Mapping[str, str], column: str) -> float:
    try:
        seconds = float(row[column]) / 1e3
    except ValueError:
        raise NotPosedError(f"{column} is not recorded") from None
    if not 0 < seconds < float("inf"):
        raise NotPosedError(f"{column} is not recorded")
    return seconds
