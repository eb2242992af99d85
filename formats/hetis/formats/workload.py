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
from hetis.formats.errors import DocumentError, Problem, shown, single_problem
from hetis.formats.fields import API_VERSION, DocumentPart, Title
from hetis.formats.loading import read_data, validated
from hetis.formats.positions import Text
from hetis.formats.prefix_hits import no_hash_ids
from hetis.formats.traces import ENDINGS, MAX_TOKENS, PrefixHitRate, load_trace
from hetis.solver.workload import LengthBin, Workload

Tokens = Annotated[float, Field(ge=1, le=MAX_TOKENS)]
Weight = Annotated[float, Field(gt=0, le=1e15)]
Rate = Annotated[float, Field(gt=0, le=1e9)]


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
    """A share of the requests: all of about these lengths. Weights need not sum to one."""

    prompt_tokens: Tokens
    output_tokens: Tokens
    weight: Weight


class WorkloadDocument(DocumentPart):
    """Traffic: a histogram of request lengths, or their means, or the path of a trace (from this file's folder).

    ``prefix_hit_rate`` is the share of prompt tokens that a prefix cache has; ``trace`` counts it in a Mooncake trace.
    """

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["Workload"]
    name: Title
    rate_rps: Rate | None = None
    clipped_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    prefix_hit_rate: HitRate = 0.0
    histogram: Annotated[list[BinPart], Field(min_length=1, max_length=1_000_000)] | None = None
    mean_prompt_tokens: Tokens | None = None
    mean_output_tokens: Tokens | None = None
    trace: str | None = None


def load_workload(ref: str | os.PathLike[str], *, prefix_hit_rate: PrefixHitRate | None = None) -> Workload:
    """Return the workload that ``ref`` names.

    Args:
        ref: a catalogue name (``azure_conv_2023``); plain means as prompt/output tokens (``8000/300``); a trace
            (``.csv``, ``.jsonl``, optionally followed by ``.gz``; see `load_trace`); or a Workload file (``-``:
            standard input).
        prefix_hit_rate: replaces the source's own; None: that of the Workload file, or 0.

    Raises:
        DocumentError: the name is unknown, the file has problems (all of them), or hits cannot be counted in it.
    """
    text = os.fspath(ref)
    if _MEANS.fullmatch(text) and not os.path.exists(text):
        return with_prefix_hits(_means(text), prefix_hit_rate)
    if text.endswith(ENDINGS):
        return load_trace(text, prefix_hit_rate=prefix_hit_rate or 0.0)
    try:
        return with_prefix_hits(catalogue.find_workload(text).workload, prefix_hit_rate)
    except catalogue.UnknownNameError as error:
        if not (text == "-" or text.endswith((".json", ".yaml", ".yml")) or os.path.exists(text)):
            raise DocumentError([Problem(file="workload", message=f"{error} (nor is there such a file)")]) from None
    data, source = read_data(text)
    if isinstance(data, list) or (isinstance(data, dict) and "input_lens" in data and "kind" not in data):
        message = "is a trace rather than a Workload: hetis-plan convert FILE --out trace.csv reads it"
        raise single_problem(text, message)
    if prefix_hit_rate is not None and isinstance(data, dict):
        data = {**data, "prefix_hit_rate": prefix_hit_rate}
    return parse_workload(data, source)


def with_prefix_hits(workload: Workload, prefix_hit_rate: PrefixHitRate | None) -> Workload:
    """Return a workload with another hit rate; None: with its own.

    Raises:
        DocumentError: hits are to be counted, and it is no trace any more.
    """
    if prefix_hit_rate == "trace":
        raise no_hash_ids(f"workload {workload.name}")
    return workload if prefix_hit_rate is None else replace(workload, prefix_hit_rate=prefix_hit_rate)


def named_workload(name: str) -> Workload:
    """Return the workload of a catalogue name or of plain means: `load_workload` for names that must not open files.

    Raises:
        DocumentError: the name is unknown.
    """
    if _MEANS.fullmatch(name):
        return _means(name)
    try:
        return catalogue.find_workload(name).workload
    except catalogue.UnknownNameError as error:
        raise DocumentError([Problem(file="workload", message=str(error))]) from None


def parse_workload(data: Any, source: Text) -> Workload:
    """Return the workload in a document's plain data. A trace's path is relative to ``source.file``.

    Raises:
        DocumentError: with every problem of the document.
    """
    folder = Path(source.file).parent
    return validated(
        WorkloadDocument,
        data,
        source,
        to_value=partial(_to_workload, folder=folder),
        check=partial(_check_workload, folder=folder),
    )


def workload_to_data(workload: Workload) -> dict[str, Any]:
    """Return a workload's document, a histogram, as plain data. Reading it again gives an equal workload."""
    data: dict[str, Any] = {"apiVersion": API_VERSION, "kind": "Workload", "name": workload.name}
    if workload.rate_rps is not None:
        data["rate_rps"] = workload.rate_rps
    if workload.clipped_ratio:
        data["clipped_ratio"] = workload.clipped_ratio
    if workload.prefix_hit_rate:
        data["prefix_hit_rate"] = workload.prefix_hit_rate
    data["histogram"] = [
        {"prompt_tokens": b.prompt_tokens, "output_tokens": b.output_tokens, "weight": b.weight} for b in workload.bins
    ]
    return data


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
    return Workload(name=text, bins=(LengthBin(prompt_tokens=lengths[0], output_tokens=lengths[1], weight=1.0),))


def _to_workload(document: WorkloadDocument, folder: Path) -> Workload:
    rate, hit_rate = document.rate_rps, document.prefix_hit_rate
    bins: tuple[LengthBin, ...] = ()
    if document.trace is not None:
        traced = load_trace(folder / document.trace, name=document.name, prefix_hit_rate=hit_rate)
        rate, bins, hit_rate = rate or traced.rate_rps, traced.bins, traced.prefix_hit_rate
    elif document.histogram is not None:
        bins = tuple(
            LengthBin(prompt_tokens=b.prompt_tokens, output_tokens=b.output_tokens, weight=b.weight)
            for b in document.histogram
        )
    elif document.mean_prompt_tokens is not None and document.mean_output_tokens is not None:
        prompt, output = document.mean_prompt_tokens, document.mean_output_tokens
        bins = (LengthBin(prompt_tokens=prompt, output_tokens=output, weight=1.0),)
    assert hit_rate != "trace", "checked: only a trace has hits to count"
    return Workload(
        name=document.name,
        bins=bins,
        rate_rps=rate,
        clipped_ratio=document.clipped_ratio,
        prefix_hit_rate=hit_rate,
    )


def _check_workload(data: Mapping[str, Any], folder: Path) -> list[tuple[tuple[str | int, ...], str]]:
    given = [form for form in FORMS if data.get(form) is not None]
    found: list[tuple[tuple[str | int, ...], str]] = []
    prompt, output = (data.get(f"mean_{what}_tokens") is not None for what in ("prompt", "output"))
    if output and not prompt:
        found.append(((), "mean_prompt_tokens is missing beside mean_output_tokens"))
    elif prompt and not output:
        found.append(((), "mean_output_tokens is missing beside mean_prompt_tokens"))
    elif not given:
        found.append(((), "one of histogram, mean_prompt_tokens with mean_output_tokens, or trace is missing"))
    trace = data.get("trace")
    if isinstance(trace, str) and not os.path.isfile(folder / trace):
        found.append((("trace",), f"no such file: {folder / trace}"))
    if data.get("prefix_hit_rate") == "trace" and trace is None:
        found.append((("prefix_hit_rate",), "is trace, and without a trace there are no hash_ids to count hits by"))
    if len(given) > 1:
        found.append(((given[1],), f"cannot be combined with {given[0]}: the lengths are given twice"))
    return found
