"""Objects of operators match the whole CRDs, whose files are in the folder named by HETIS_CRDS.

They are 1 to 3 MB each and not part of this repository. `kubectl get crd NAME -o yaml` prints those of a cluster;
projects have them under config/crd, at the commits that `schemas.py` names. The schemas in that file are always checked
against.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hetis.planner.export import ExportTarget
from hetis.planner.export.replicas import NotExportableError
from tests.planner.export import reading
from tests.planner.export.exporting import exported
from tests.planner.export.plans import PLANS

FOLDER = os.environ.get("HETIS_CRDS")
CHANGES: Mapping[str, Any] = {
    "model_claim": "models",
    "namespace": "serving",
    "api_key_secret": "api",
    "hf_token_secret": "hub",
}
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="NOT CHECKED BY WHOLE CRDS: HETIS_CRDS names no folder with their files"
)


def strict(schema: Any) -> Any:
    """Return a schema that refuses unknown fields, which a Kubernetes server drops silently."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {
        key: {name: strict(each) for name, each in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
        if key not in ("enum", "required", "default")
    } | {key: schema[key] for key in ("enum", "required") if key in schema}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    return made if is_open or "properties" not in schema else made | {"additionalProperties": False}


@pytest.fixture(scope="module")
def validators() -> Mapping[tuple[str, str], jsonschema.Draft202012Validator]:
    """Return the schemas by API version and kind."""
    return dict(_validators(Path(FOLDER or "")))


def _validators(folder: Path) -> Iterator[tuple[tuple[str, str], jsonschema.Draft202012Validator]]:
    for path in sorted(folder.glob("*.yaml")):
        one = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
        assert one["kind"] == "CustomResourceDefinition", path
        for version in one["spec"]["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own metadata
            key = f"{one['spec']['group']}/{version['name']}", one["spec"]["names"]["kind"]
            yield key, jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("changes", [{}, CHANGES], ids=["plain", "all options"])
@pytest.mark.parametrize("target", [ExportTarget.LWS, ExportTarget.LLM_D, ExportTarget.KSERVE, ExportTarget.DYNAMO])
def test_whole_crds_take_every_object(
    validators: Mapping[tuple[str, str], jsonschema.Draft202012Validator], target: ExportTarget, changes: dict[str, Any]
) -> None:
    num_checked = 0
    for name in PLANS:
        try:
            made = exported(PLANS[name], target, **changes, insecure="api_key_secret" not in changes)
        except NotExportableError:
            continue
        for one in reading.manifests({p: t for p, t in made.files.items() if not p.startswith("values-")}):
            validator = validators.get((one["apiVersion"], one["kind"]))
            if validator is not None:
                validator.validate(one)
                num_checked += 1
    if not num_checked:
        pytest.skip(f"NOT CHECKED BY WHOLE CRDS: HETIS_CRDS has none of {target.value}")


def test_what_a_crd_does_not_know_is_found(
    validators: Mapping[tuple[str, str], jsonschema.Draft202012Validator],
) -> None:
    objects = reading.manifests(exported(PLANS["one GPU"], ExportTarget.LWS).files)
    [one] = [each for each in objects if each["kind"] == "LeaderWorkerSet"]
    validator = validators.get((one["apiVersion"], one["kind"]))
    if validator is None:
        pytest.skip("NOT CHECKED BY WHOLE CRDS: HETIS_CRDS has no LeaderWorkerSet")
    one["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePolicy"):
        validator.validate(one)
