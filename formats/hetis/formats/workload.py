"""Workload files, and all other ways to specify a workload: the catalogue, traces, and plain means."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, Problem, shown
from hetis.formats.fields import Document, DocumentPart, Duration, Found, Title, entries, plain, present, value_of
from hetis.formats.kinds import Kind, read_data, validated, with_envelope
from hetis.formats.positions import Text
from hetis.formats.traces import ENDINGS, MAX_TOKENS, PrefixHitRate, load_trace
from hetis.formats.traces.hits import no_hash_ids
from hetis.formats.units import format_duration
from hetis.solver.workload import MOST_BURSTINESS, LengthBin, RequestClass, Workload, misfits_of_classes

Tokens = Annotated[float, Field(ge=1, le=MAX_TOKENS)]
Weight = Annotated[float, Field(gt=0, le=1e15)]
Rate = Annotated[float, Field(gt=0, le=1e9)]
Limit = Annotated[Duration, Field(gt=0)]
MOST_CLASSES = 4


def _hit_rate(value: object) -> PrefixHitRate:
    if value == "trace":
        return "trace"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise ValueError(f"{shown(value)} is not a share of at least 0 and below 1, nor trace")


HitRate = Annotated[
    float | Literal["trace"],
    PlainValidator(_hit_rate),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, {"const": "trace"}]}),
]

FORMS = ("histogram", "mean_prompt_tokens", "trace")
_MEANS = re.compile(r"-?[\d._]+/-?[\d._]+")


class BinPart(DocumentPart):
    """A share of the requests, all with about these lengths. Weights need not sum to one."""

    prompt_tokens: Tokens
    output_tokens: Tokens
    weight: Weight


class ClassPart(DocumentPart):
    """A class of requests: those with longer prompts than the class before, up to its own bound; the last has none.

    ``ttft`` and ``tpot`` are limits of its own (default: those of the command).
    """

    name: Title
    max_prompt_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    ttft: Limit | None = None
    tpot: Limit | None = None


class WorkloadDocument(Document):
    """Traffic: a histogram of request lengths, their means, or the path of a trace (relative to this file's folder).

    ``classes``, the shortest first, are those by which ``place`` may route requests (`--classes` replaces them).
    ``prefix_hit_rate`` is the share of prompt tokens found in a prefix cache; ``trace`` counts it in a Mooncake trace.
    ``burstiness`` is the coefficient of variation of the gaps between arrivals: 1 of Poisson arrivals, above 1 bursts.
    """

    kind: Literal["Workload"]
    name: Title
    rate_rps: Rate | None = None
    clipped_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    prefix_hit_rate: HitRate = 0.0
    burstiness: Annotated[float, Field(ge=0, le=MOST_BURSTINESS)] = 1.0
    histogram: Annotated[list[BinPart], Field(min_length=1, max_length=1_000_000)] | None = None
    mean_prompt_tokens: Tokens | None = None
    mean_output_tokens: Tokens | None = None
    trace: str | None = None
    classes: Annotated[list[ClassPart], Field(max_length=MOST_CLASSES)] = Field(default_factory=list)


def load_workload(
    ref: str | os.PathLike[str], *, prefix_hit_rate: PrefixHitRate | None = None, notes: list[str] | None = None
) -> Workload:
    """Return the workload that ``ref`` names. Raises DocumentError if the name is unknown, the file has problems (all
    of them), or hits cannot be counted in it.

    ``ref``: a catalogue name (``azure_conv_2023``); plain means as prompt/output tokens (``8000/300``); a trace
    (``.csv``, ``.tsv``, ``.jsonl`` or ``.log``, optionally followed by ``.gz``; see `load_trace`); or a Workload file
    (``-``: standard input). ``prefix_hit_rate``: replaces the source's own; None: that of the Workload file, or 0.
    ``notes`` gets sentences about what was assumed.
    """
    text = os.fspath(ref)
    if _MEANS.fullmatch(text) and not os.path.exists(text):
        return with_prefix_hits(_means(text), prefix_hit_rate)
    if text.endswith(ENDINGS):
        return load_trace(text, prefix_hit_rate=prefix_hit_rate or 0.0, notes=notes)
    try:
        return with_prefix_hits(catalogue.find_workload(text).workload, prefix_hit_rate)
    except catalogue.UnknownNameError as error:
        if not (text == "-" or text.endswith((".json", ".yaml", ".yml")) or os.path.exists(text)):
            form = "; mean lengths are PROMPT/OUTPUT tokens, such as 8000/300" if text[:1].isdigit() else ""
            message = f"{error} (and no such file exists){form}"
            raise DocumentError([Problem(file="workload", message=message)]) from None
    data, source = read_data(text)
    if isinstance(data, list) or (isinstance(data, dict) and data and not {"apiVersion", "kind"} & data.keys()):
        return load_trace(text, prefix_hit_rate=prefix_hit_rate or 0.0, notes=notes)
    if prefix_hit_rate is not None and isinstance(data, dict):
        data = {**data, "prefix_hit_rate": prefix_hit_rate}
    return parse_workload(data, source)


def with_prefix_hits(workload: Workload, prefix_hit_rate: PrefixHitRate | None) -> Workload:
    """Return a workload with another hit rate; None: its own. Raises DocumentError if hits are to be counted in it."""
    if prefix_hit_rate == "trace":
        raise no_hash_ids(f"workload {workload.name}")
    return workload if prefix_hit_rate is None else replace(workload, prefix_hit_rate=prefix_hit_rate)


def named_workload(name: str) -> Workload:
    """Return `load_workload` of a catalogue name or means, without opening files. Raises DocumentError if unknown."""
    if _MEANS.fullmatch(name):
        return _means(name)
    try:
        return catalogue.find_workload(name).workload
    except catalogue.UnknownNameError as error:
        raise DocumentError([Problem(file="workload", message=str(error))]) from None


def parse_workload(data: Any, source: Text) -> Workload:
    """Return the workload in plain data; a trace's path is relative to ``source.file``. Raises DocumentError."""
    folder = Path(source.file).parent
    to_value, check = partial(_to_workload, folder=folder), partial(_check_workload, folder=folder)
    return validated(WorkloadDocument, data, source, to_value=to_value, check=check)


def _workload_data(workload: Workload) -> dict[str, Any]:
    return present(
        {
            "name": workload.name,
            "rate_rps": workload.rate_rps,
            "clipped_ratio": workload.clipped_ratio or None,
            "prefix_hit_rate": workload.prefix_hit_rate or None,
            "burstiness": None if workload.burstiness == 1.0 else workload.burstiness,
            "histogram": plain(workload.bins),
            "classes": [_class_data(one) for one in workload.classes] or None,
        }
    )


def _class_data(one: RequestClass) -> dict[str, Any]:
    limits = {"ttft": one.ttft_limit_s, "tpot": one.tpot_limit_s}
    texts = {name: None if limit_s is None else format_duration(limit_s) for name, limit_s in limits.items()}
    return present({"name": one.name, "max_prompt_tokens": one.max_prompt_tokens, **texts})


def _means(text: str) -> Workload:
    """Return the workload of ``8000/300``, in which all requests are equal."""
    prompt, _, output = text.partition("/")
    try:
        lengths = [float(prompt), float(output)]
    except ValueError:
        lengths = []
    if not lengths or not all(1 <= tokens <= MAX_TOKENS for tokens in lengths):
        message = f"{text[:80]!r} is not a pair of mean lengths such as 8000/300, each 1 to {MAX_TOKENS} tokens"
        raise DocumentError([Problem(file="workload", message=message)])
    return Workload(name=text, bins=_equal(*lengths))


def _equal(prompt_tokens: float, output_tokens: float) -> tuple[LengthBin, ...]:
    return (LengthBin(prompt_tokens=prompt_tokens, output_tokens=output_tokens, weight=1.0),)


def _to_workload(document: WorkloadDocument, folder: Path) -> Workload:
    rate, hit_rate = document.rate_rps, document.prefix_hit_rate
    bins = tuple(value_of(LengthBin, part) for part in document.histogram or ())
    if document.trace is not None:
        traced = load_trace(folder / document.trace, name=document.name, prefix_hit_rate=hit_rate)
        rate, bins, hit_rate = rate or traced.rate_rps, traced.bins, traced.prefix_hit_rate
    elif document.mean_prompt_tokens is not None and document.mean_output_tokens is not None:
        bins = _equal(document.mean_prompt_tokens, document.mean_output_tokens)
    assert hit_rate != "trace", "checked: only a trace has hits to count"
    classes = tuple(
        RequestClass(
            name=one.name, max_prompt_tokens=one.max_prompt_tokens, ttft_limit_s=one.ttft, tpot_limit_s=one.tpot
        )
        for one in document.classes
    )
    return Workload(
        name=document.name, bins=bins, rate_rps=rate, clipped_ratio=document.clipped_ratio, prefix_hit_rate=hit_rate,
        classes=classes, burstiness=document.burstiness,
    )  # fmt: skip


def _check_workload(data: Mapping[str, Any], folder: Path) -> Found:
    given = [form for form in FORMS if data.get(form) is not None]
    prompt, output = (data.get(f"mean_{what}_tokens") is not None for what in ("prompt", "output"))
    if output and not prompt:
        yield (), "mean_prompt_tokens is missing: mean_output_tokens needs it"
    elif prompt and not output:
        yield (), "mean_output_tokens is missing: mean_prompt_tokens needs it"
    elif not given:
        yield (), "one of histogram, mean_prompt_tokens with mean_output_tokens, or trace is missing"
    trace = data.get("trace")
    if isinstance(trace, str) and not os.path.isfile(folder / trace):
        yield ("trace",), f"no such file: {folder / trace}"
    if data.get("prefix_hit_rate") == "trace" and trace is None:
        yield ("prefix_hit_rate",), "is trace, but without a trace there are no hash_ids to count hits"
    yield from _check_classes(data.get("classes"))
    if len(given) > 1:
        yield (given[1],), f"cannot be combined with {given[0]}: both define the lengths"


def _check_classes(data: Any) -> Found:
    bounds = [(one.get("name"), one.get("max_prompt_tokens")) for _, one in entries(data)]
    if all(isinstance(name, str) and (most is None or (type(most) is int and most > 0)) for name, most in bounds):
        classes = [RequestClass(name=str(name), max_prompt_tokens=most) for name, most in bounds]
        for number, wrong in misfits_of_classes(classes):
            yield ("classes", number), wrong


to_data = with_envelope(WorkloadDocument, _workload_data)
WORKLOAD = Kind(document=WorkloadDocument, value=Workload, parse=parse_workload, to_data=to_data)
