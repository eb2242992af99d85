"""All kinds of documents in one place: load by kind, dump, digest, JSON Schema."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import yaml

from hetis.formats.cluster import CLUSTER, cluster_to_data, load_cluster
from hetis.formats.dispatch.dispatch_state import DISPATCH_STATE, load_state
from hetis.formats.dispatch.new_requests import DISPATCH_REQUESTS, NewRequests, load_requests
from hetis.formats.dispatch.saved_state import SavedState
from hetis.formats.errors import DocumentError, did_you_mean, shown, single_problem
from hetis.formats.files import canonical_json, content_digest, write_atomically
from hetis.formats.kinds import Kind, read_data, refuse_other_than_mapping
from hetis.formats.models.document import MODEL_SPEC, load_model
from hetis.formats.plan import PLAN, load_plan
from hetis.formats.positions import FLOAT, Text
from hetis.formats.profile import PROFILE, load_profile
from hetis.formats.tenants import TENANTS, FleetTenants, load_tenants
from hetis.formats.workload import WORKLOAD, load_workload
from hetis.solver.cluster import Cluster
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan
from hetis.solver.profile import Profile
from hetis.solver.workload import Workload

if TYPE_CHECKING:
    _Base = yaml.SafeDumper
else:
    _Base = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast

__all__ = ["KINDS", "Value", "digest", "dump", "dump_data", "from_data", "json_schema", "kind_of", "load", "to_data"]
__all__ += ["load_cluster", "load_model", "load_plan", "load_profile", "load_requests"]
__all__ += ["load_state", "load_tenants", "load_workload", "write_atomically", "yaml_text"]
Value = Cluster | ModelSpec | Workload | Profile | Plan | SavedState | NewRequests | FleetTenants

_NOT_UTF_8 = re.compile("[\ud800-\udfff]")  # bytes that are not UTF-8, as Python represents them (os.fsdecode)

_KINDS: dict[str, Kind[Any]] = {
    kind.name: kind
    for kind in (*(CLUSTER, MODEL_SPEC, WORKLOAD, PROFILE, PLAN, DISPATCH_STATE, DISPATCH_REQUESTS, TENANTS),)
}
KINDS = tuple(_KINDS)


def load(path: str | os.PathLike[str]) -> Value:
    """Return the value of a document of any kind (``-``: standard input). Raises DocumentError with every problem."""
    return _parse(*read_data(path))


def from_data(data: Any, *, name: str = "document") -> Value:
    """Return the value of a document given as plain data, such as ``Plan.inputs["documents"]["cluster"]``. Raises
    DocumentError with every problem of the document.

    ``data``: dicts, lists, strings and numbers, as in JSON; ``name``: the document's name in messages.
    """
    return _parse(data, Text(file=name, text=None))


def to_data(value: Value, *, self_contained: bool = False) -> dict[str, Any]:
    """Return the document of a value as plain data. `from_data` gives an equal value back. With ``self_contained``
    it includes what would be looked up in the catalogue (the GPU types of a cluster).
    """
    if isinstance(value, Cluster):
        return cluster_to_data(value, embed_gpu_types=self_contained)
    return _KINDS[kind_of(value)].to_data(value)


def kind_of(value: Value) -> str:
    """Return the kind of document that a value is written as."""
    return next(name for name, kind in _KINDS.items() if isinstance(value, kind.value))


def dump(value: Value, form: Literal["yaml", "json"] = "yaml") -> str:
    """Return the document of a value as YAML or JSON text. Reading it again gives an equal value. Raises ValueError if
    a plan's ``inputs`` hold what JSON cannot represent (NaN, infinity, objects).
    """
    return dump_data(to_data(value), form)


def dump_data(data: Mapping[str, Any], form: Literal["yaml", "json"] = "yaml") -> str:
    """Return plain data as YAML or JSON text. Raises ValueError if there are values that JSON cannot represent.

    Bytes of file names that are not UTF-8 are written as ``\\xNN``.
    """
    try:
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from None
    text = _NOT_UTF_8.sub(lambda found: rf"\\x{ord(found[0]) & 0xFF:02x}", text)
    if form == "json":
        return text + "\n"
    return yaml_text(json.loads(text))


def yaml_text(*values: Any) -> str:
    """Return plain data as a stream of one YAML document for each value, with their keys in order and no aliases."""
    return str(yaml.dump_all(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def digest(value: Value) -> str:
    """Return ``sha256:...`` of the value's self-contained document in canonical JSON, equal for equal values."""
    return content_digest(canonical_json(to_data(value, self_contained=True)))


@functools.cache
def json_schema(kind: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a kind. Raises DocumentError, with the nearest, if it is unknown."""
    if kind not in _KINDS:
        message = f"unknown kind {shown(kind)}, expected one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
        raise single_problem("schema", message)
    schema, own = "https://json-schema.org/draft/2020-12/schema", f"https://hetis.dev/schema/v1/{kind}.json"
    fields = _KINDS[kind].document.model_json_schema(by_alias=True)
    return {"$schema": schema, "$id": own, **fields, "title": kind}


def _parse(data: Any, source: Text) -> Value:
    refuse_other_than_mapping(data, source)
    name = data.get("kind")
    if not isinstance(name, str) or name not in _KINDS:
        expected = f"expected one of {', '.join(KINDS)}"
        if "kind" not in data:
            raise DocumentError([source.problem((), f"kind is missing, {expected}")])
        hint = did_you_mean(name, KINDS) if isinstance(name, str) else ""
        raise DocumentError([source.problem(("kind",), f"is {shown(name)}, {expected}{hint}")])
    value: Value = _KINDS[name].parse(data, source)
    return value


class _Dumper(_Base):
    """Quotes whatever YAML 1.1 or 1.2 would not take for text, keeps lines as lines, and never writes aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Unquoted, PyYAML writes these line breaks as they are, and reads them back as spaces.
    style = '"' if any(break_ in text for break_ in "\x85\u2028\u2029") else "|" if "\n" in text.strip() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
# PyYAML only knows the numbers of YAML 1.1, so the text "1e5" would be written unquoted and read as a number.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{FLOAT.pattern})$"), list("-+0123456789."))
# Nor does it know two forms that kubectl reads (go-yaml): the short booleans of YAML 1.1, and the octals of YAML 1.2.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("[yYnN]$"), list("yYnN"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("[-+]?0o[0-7_]+$"), list("-+0"))
