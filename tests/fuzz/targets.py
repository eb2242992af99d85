"""All readers of untrusted input as functions of bytes: each returns, or fails in a documented way.

An exception that a target lets through is a finding. So is an input that takes a second (`MOST_S`), as inputs are
small.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from hetis.commands.x509 import ends_of_certificates
from hetis.formats import documents
from hetis.formats.discovery.fleet import discovered
from hetis.formats.discovery.reading import read_inventory
from hetis.formats.errors import DocumentError
from hetis.formats.measurements import load_measurements
from hetis.formats.positions import parse_text
from hetis.formats.traces import read_trace
from hetis.formats.traces.rows import characters_counter
from hetis.planner.convert.documents import read_document
from hetis.planner.convert.plans import objective_from_proto
from hetis.planner.convert.stages import stage_from_proto
from hetis.planner.failures import ServiceError
from hetis.planner.service.identity.credentials import Tokens
from hetis.planner.service.settings import load_config
from hetis.runtime.agent.pressure import ScrapeState, read_text
from hetis.runtime.vllm.settings import SettingsError, load_settings
from hetis.solver.cluster import Cluster
from hetis.solver.errors import HetisError, InvalidProblemError
from hetis.solver.plan import Plan
from hetis.solver.workload import Workload
from hetis.v1 import document_pb2, plan_pb2, stage_pb2
from tests.fuzz.http_bytes import ask_agent, ask_page, read_engine
from tools.simulator_tables import READERS, import_tables

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
MOST_BYTES = 20_000
MOST_S = 5.0
"""Limit on the CPU time of one input; far above what any takes, and far below what does harm."""

Read = Callable[[bytes], object]


@dataclass(frozen=True, kw_only=True)
class Target:
    """``read`` takes the bytes; ``seeds`` are patterns of repository files to start from."""

    read: Read
    seeds: tuple[str, ...] = ()

    def inputs(self, name: str) -> Iterator[Path]:
        """Yield the kept corpus, which includes every finding, and the seeds."""
        yield from sorted((CORPUS / name).glob("*"))
        for pattern in self.seeds:
            yield from (path for path in sorted(ROOT.glob(pattern)) if path.suffix != ".expected")


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="hetis-fuzz-"))


def _from_file(load: Callable[[str], object], stem: str, suffix: str, data: bytes) -> None:
    """Load from a file, since loaders take paths and choose the form by suffix."""
    if not suffix:
        suffix = ".json" if data.lstrip()[:1] in (b"{", b"[") else ".yaml"
    path = _folder() / f"{stem}{suffix}"
    path.write_bytes(data)
    with suppress(DocumentError, InvalidProblemError):
        load(str(path))


def _table(form: str, path: str) -> None:
    import_tables(form, [path])


def _text(data: bytes) -> None:
    with suppress(DocumentError):
        parse_text(data.decode("utf-8", errors="replace"), "document")


def _document(kind: type[Any], data: bytes) -> None:
    """Read a document in the form that a request carries."""
    with suppress(DocumentError, InvalidProblemError, ServiceError):
        read_document(document_pb2.Document(content=data), kind)


def _metrics(data: bytes) -> None:
    found = read_text(data.decode("utf-8", errors="replace"), name="engine")
    assert (found.state is ScrapeState.READ) == bool(found.readings)


def _certificates(data: bytes) -> None:
    ends_of_certificates(data.decode("utf-8", errors="replace"))


def _plugin_settings(path: str) -> None:
    with suppress(SettingsError):
        load_settings(Path(path))


def _message(kind: type[Message], use: Callable[[Any], object], data: bytes) -> None:
    try:
        message = kind.FromString(data)
    except DecodeError:
        return
    with suppress(ServiceError, HetisError):
        use(message)


def _stage(message: stage_pb2.StageModel) -> None:
    stage_from_proto(message)


def _objective(message: plan_pb2.Objective) -> None:
    wrong = list[tuple[str, str]]()
    objective_from_proto(message, "objective", lambda field, why: wrong.append((field, why)))


def _fleet(path: str) -> None:
    discovered(read_inventory([path]), name="fuzz", said={})


def _trace(path: str) -> None:
    read_trace(path, count=characters_counter(4))


LOADERS: dict[str, tuple[Callable[[str], object], str, tuple[str, ...]]] = {
    "cluster": (documents.load_cluster, "", ("tests/bad_input/cluster_*", "examples/paper.yaml")),
    "model": (documents.load_model, "", ("tests/bad_input/model_*",)),
    "profile": (documents.load_profile, "", ("tests/bad_input/profile_*",)),
    "plan": (documents.load_plan, "", ("tests/bad_input/plan_*",)),
    "workload": (documents.load_workload, "", ("tests/bad_input/workload_*.yaml",)),
    "trace_csv": (documents.load_workload, ".csv", ("tests/bad_input/workload_*.csv",)),
    "trace_gz": (documents.load_workload, ".csv.gz", ("tests/bad_input/workload_*.csv",)),
    "trace_jsonl": (documents.load_workload, ".jsonl", ("tests/bad_input/workload_*.jsonl",)),
    "trace_json": (_trace, ".json", ()),
    "trace_log": (_trace, ".log", ()),
    "state": (documents.load_state, "", ("tests/bad_input/state_*",)),
    "requests": (documents.load_requests, "", ("tests/bad_input/requests_*",)),
    "tenants": (documents.load_tenants, "", ("tests/bad_input/tenants_*", "examples/three-models.yaml")),
    "inventory": (_fleet, "", ("tests/formats/discovery/inputs/*.[jctx]*",)),
    "measurements": (load_measurements, "", ()),
    "planner_config": (partial(load_config, environment={}), "", ("examples/service/*.yaml",)),
    "tokens": (Tokens.load, ".yaml", ()),
}
TARGETS: Mapping[str, Target] = {
    **{
        name: Target(read=partial(_from_file, load, name, suffix), seeds=seeds)
        for name, (load, suffix, seeds) in LOADERS.items()
    },
    **{f"import_{form}": Target(read=partial(_from_file, partial(_table, form), form, ".csv")) for form in READERS},
    "text": Target(read=_text, seeds=("tests/bad_input/cluster_*",)),
    "request_cluster": Target(read=partial(_document, Cluster), seeds=("tests/bad_input/cluster_*",)),
    "request_plan": Target(read=partial(_document, Plan), seeds=("tests/bad_input/plan_*",)),
    "request_workload": Target(read=partial(_document, Workload), seeds=("tests/bad_input/workload_*.yaml",)),
    "prometheus": Target(read=_metrics),
    "http_page": Target(read=ask_page),
    "http_agent": Target(read=ask_agent),
    "http_engine": Target(read=read_engine),
    "certificates": Target(read=_certificates),
    "plugin_settings": Target(read=partial(_from_file, _plugin_settings, "workers", "")),
    "stage": Target(read=partial(_message, stage_pb2.StageModel, _stage)),
    "objective": Target(read=partial(_message, plan_pb2.Objective, _objective)),
}
