"""Files of any kind: their validation, and the conversion of traces in common formats into ours."""

from __future__ import annotations

import gzip
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetis.formats.catalogue import gpu_types, known_gpu
from hetis.formats.cluster import parse_cluster
from hetis.formats.discovery.found import counted
from hetis.formats.dispatch.new_requests import NewRequests
from hetis.formats.dispatch.saved_state import SavedState
from hetis.formats.documents import Value, dump_data, kind_of, load, load_model, load_workload
from hetis.formats.errors import DocumentError, Problem, did_you_mean, single_problem
from hetis.formats.fields import API_VERSION
from hetis.formats.files import read_text
from hetis.formats.kinds import read_data
from hetis.formats.models.document import is_config
from hetis.formats.positions import Text, parse_text
from hetis.formats.tenants import FleetTenants
from hetis.formats.traces import ENDINGS, Trace, read_trace, spaced, trace_text
from hetis.formats.traces.forms import CountTokens
from hetis.formats.traces.rows import CSV_ENDINGS, JSONL_ENDINGS, characters_counter
from hetis.planner.use_cases.sources import notes_on_vendors, profile_without_file
from hetis.solver.cluster import Cluster
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan
from hetis.solver.profile import Profile
from hetis.solver.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """The result for one file: its kind and name if it is valid, or else its problems.

    A valid file may have warnings: what a plan needs besides it.
    """

    file: str
    kind: str | None = None
    name: str = ""
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()


def validate_file(path: str) -> Validation:
    """Read a file as the kind that it states; traces and Hugging Face configs as `load_workload` and
    `load_model` recognise them.
    """
    try:
        value = _load_any(path)
    except DocumentError as error:
        return Validation(file=path, problems=error.problems)
    warnings = (*_without_profile(value), *notes_on_vendors(value)) if isinstance(value, Cluster) else ()
    return Validation(file=path, kind=kind_of(value), name=_name(value), warnings=warnings)


def _without_profile(cluster: Cluster) -> Iterator[str]:
    """Yield a warning for each GPU type in use that has no profile and for which none can be modelled."""
    for gpu in cluster.types_used():
        try:
            profile_without_file(cluster.gpu_types[gpu])
        except InvalidProblemError as error:
            yield str(error)


def _load_any(path: str) -> Value:
    if path.endswith(ENDINGS):
        return load_workload(path)
    if path.endswith(".json") and is_config(path, read_data(path)[0]):
        return load_model(path)
    return load(path)


def _name(value: Value) -> str:
    match value:
        case Cluster() | ModelSpec() | Workload() | SavedState():
            return value.name
        case Profile():
            return value.gpu
        case Plan():
            return f"{value.strategy}, {counted(len(value.replicas), 'replica')}"
        case NewRequests():
            return counted(len(value.requests), "request")
        case FleetTenants():
            return counted(len(value.tenants), "tenant")


CHARACTERS_PER_TOKEN = 4.0
"""For English prose in the vocabularies of 2023 to 2026; code and other languages have fewer characters per token."""


def convert(
    path: str, *, characters_per_token: float | None = None, tokenizer: str | None = None, rate_rps: float | None = None
) -> tuple[Trace, list[str]]:
    """Return a trace in any known format, and warnings about its values that do not come from the file.

    The tokens of texts without counts are counted by ``tokenizer``, a ``tokenizer.json`` or its folder, or estimated
    from their characters (None: `CHARACTERS_PER_TOKEN`). Requests without times arrive at ``rate_rps``.

    Raises:
        DocumentError: the file is not usable, or a rate is specified for requests that have times.
    """
    ratio = characters_per_token or CHARACTERS_PER_TOKEN
    count, is_asked = tokenizer_counter(tokenizer) if tokenizer else characters_counter(ratio), False

    def given(text: str) -> int:
        nonlocal is_asked
        is_asked = True
        return count(text)

    trace = read_trace(path, count=given)
    warnings = list(trace.readings)
    if is_asked and not tokenizer:
        warnings.append(
            f"lengths are estimates at {ratio:g} characters per token; --tokenizer counts tokens exactly, and"
            " --characters-per-token sets another ratio"
        )
    if rate_rps is not None:
        if trace.has_times:
            raise single_problem(path, f"has arrival times ({trace.form}): --rate is only for files without them")
        trace = spaced(trace, rate_rps)
    elif not trace.has_times:
        warnings.append("the file has no arrival times, so all requests arrive at once; --rate spaces them evenly")
    return trace, warnings


def trace_file(trace: Trace, name: str) -> bytes:
    """Return the trace in the format that a file name implies: JSONL or CSV, compressed or not.

    Raises:
        DocumentError: the name has another ending.
    """
    if not name.endswith(CSV_ENDINGS + JSONL_ENDINGS):
        raise single_problem(name, f"the name of a trace must end in {', '.join(CSV_ENDINGS + JSONL_ENDINGS)}")
    raw = "".join(trace_text(trace, as_jsonl=name.endswith(JSONL_ENDINGS))).encode("ascii")
    return gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw


def tokenizer_counter(path: str) -> CountTokens:
    """Return a function that counts a text's tokens with a Hugging Face tokenizer, without special tokens.

    Raises:
        DocumentError: the tokenizer cannot be read, or the package for reading it is not installed.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise single_problem(path, "is not a tokenizer: expected a tokenizer.json or its folder")
    try:
        tokenizers: Any = importlib.import_module("tokenizers")
    except ImportError:
        raise single_problem(path, "needs the package tokenizers: pip install tokenizers") from None
    try:
        made = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises Exception itself
        raise single_problem(str(file), f"is not a tokenizer: {str(error)[:200]}") from None
    return lambda text: len(made.encode(text, add_special_tokens=False).ids)


def with_gpu_type(name: str, figures: Mapping[str, str], into: str | None) -> str:
    """Return the ``gpu_types`` entry of a GPU, by the names of its figures; or the cluster file ``into`` with it.

    Raises DocumentError if a figure, the name or the file is wrong.
    """
    if (known := known_gpu(name)) is not None:
        raise single_problem("catalog add", f"{name!r} is {known.name} of the catalogue: give another name")
    # A cluster file may have any, and kernels are then scaled from another one, which no slip of the pen should cause.
    like, architectures = figures.get("architecture", ""), {gpu.architecture for gpu in gpu_types().values()}
    if like not in architectures:
        known_ones = did_you_mean(like, architectures) or f": it has {', '.join(sorted(architectures))}"
        raise single_problem("catalog add", f"no GPU of the catalogue has the architecture {like!r}{known_ones}")
    entry = {"gpu_types": {name: dict(figures)}}
    sample: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": "Cluster",
        "name": "c",
        "nodes": [{"name": "n", "gpus": [{"type": name}]}],
        "network": {"bandwidth": "100Gbps", "latency": "20us"},
        **entry,
    }
    parse_cluster(sample, Text(file="catalog add", text=None))
    lines = dump_data(entry).splitlines(keepends=True)
    if into is None:
        return "".join(lines)
    text = read_text(into)
    place = re.search(r"(?m)^gpu_types:[ \t]*(#.*)?\n", text)
    if place is not None:
        made = text[: place.end()] + "".join(lines[1:]) + text[place.end() :]
    else:
        made = text.rstrip("\n") + "\n" + "".join(lines)
    parse_cluster(*parse_text(made, into))
    return made
