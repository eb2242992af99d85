"""Exports are accepted by their readers' own parsers, or match the schemas of their objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import compose_spec
import jsonschema
import pytest
import yaml
from kubernetes_validate.utils import all_versions, schema_contents
from referencing import Registry, Resource

from hetis.planner.export import ExportTarget
from hetis.planner.export.replicas import NotExportableError
from tests.planner.export import reading, schemas
from tests.planner.export.exporting import exported
from tests.planner.export.plans import PLANS, WITH_WORKERS

_SCHEMAS = f"kubernetes-json-schema/v{all_versions()[-1]}-local-strict"


@cache
def definitions() -> Registry[Any]:
    """Return the definitions to which all Kubernetes objects refer; 2 MB, read once."""
    return Resource.from_contents(schema_contents(f"{_SCHEMAS}/_definitions.json", "")) @ Registry()


@cache
def core_validator(kind: str, version: str) -> jsonschema.Draft202012Validator:
    """The schema of a Kubernetes object, without unknown fields."""
    schema = schema_contents(f"{_SCHEMAS}/{kind.lower()}-{version}.json", "")
    return jsonschema.Draft202012Validator(schema, registry=Resource.from_contents(schema) @ definitions())


IN_PODS = sorted(set(PLANS) - {"workers of stages"})  # plans in which no card serves several ranks


def check_core(one: dict[str, Any]) -> None:
    """Check a Kubernetes object by its own schema."""
    group, _, version = one["apiVersion"].rpartition("/")
    name = f"{group.partition('.')[0]}-{version}" if group else version
    core_validator(one["kind"], name).validate(one)


@pytest.mark.parametrize("name", IN_PODS)
def test_kubernetes_takes_every_object(name: str) -> None:
    made = exported(PLANS[name], ExportTarget.KUBERNETES, namespace="serving")
    found = reading.manifests(made.files)
    assert {"Service", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget"} <= {one["kind"] for one in found}
    for one in found:
        check_object(one)
        assert one["metadata"]["namespace"] == "serving"
    listed = yaml.safe_load(made.files["kustomization.yaml"])
    assert sorted(listed["resources"]) == sorted(made.shown)


@pytest.mark.parametrize("name", PLANS)
def test_compose_takes_every_file(name: str) -> None:
    made = exported(PLANS[name], ExportTarget.COMPOSE)
    for path in made.shown:
        whole = yaml.safe_load(made.files[path])
        compose = compose_spec.PyCompose.from_json(json.dumps(whole))
        compose.validate()
        assert sorted(compose.service_names()) == sorted(whole["services"])


def pods_in(schema: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the pods and pod templates in an object, found along its schema."""
    if schema.get("$comment"):
        yield schema["$comment"], value
    for name, inner in schema.get("properties", {}).items():
        if isinstance(value, dict) and name in value:
            yield from pods_in(inner, value[name])
    if isinstance(value, list):
        for each in value:
            yield from pods_in(schema.get("items", {}), each)


def check_pod(pod: dict[str, Any], labels: dict[str, str] | None = None) -> None:
    """Check a pod by Kubernetes' own schema."""
    metadata = {"name": "pod", **({"labels": labels} if labels else {})}
    check_core({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod})


def check_object(one: dict[str, Any]) -> None:
    """Check an operator's object by our summary of its schema, or a Kubernetes object by its own schema."""
    schema = schemas.OBJECTS.get(one["kind"])
    if schema is None:
        check_core(one)
        return
    jsonschema.Draft202012Validator(schema).validate(one)
    for kind, value in pods_in(schema, one):
        template = value if kind == "PodTemplateSpec" else {"spec": value}
        assert set(template) <= {"metadata", "spec"}
        check_pod(template["spec"], template.get("metadata", {}).get("labels"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_claim": "models", "namespace": "serving", "api_key_secret": "api", "hf_token_secret": "hub"}],
)
@pytest.mark.parametrize("target", [ExportTarget.LWS, ExportTarget.LLM_D, ExportTarget.KSERVE, ExportTarget.DYNAMO])
def test_operators_take_every_object(target: ExportTarget, changes: dict[str, Any]) -> None:
    kinds = set[str]()
    for name in PLANS:
        try:
            made = exported(PLANS[name], target, **changes, insecure="api_key_secret" not in changes)
        except NotExportableError:
            continue
        for one in reading.manifests({p: t for p, t in made.files.items() if not p.startswith("values-")}):
            check_object(one)
            kinds.add(one["kind"])
            assert one["metadata"].get("namespace", "") == changes.get("namespace", "")
    assert kinds & schemas.OBJECTS.keys() == OWN_KINDS[target]


OWN_KINDS = {
    ExportTarget.LWS: {"LeaderWorkerSet", "DisaggregatedSet", "PodMonitor"},
    ExportTarget.LLM_D: {"LeaderWorkerSet", "InferencePool", "HTTPRoute"},
    ExportTarget.KSERVE: {"LLMInferenceService", "LLMInferenceServiceConfig"},
    ExportTarget.DYNAMO: {"DynamoGraphDeployment"},
}


@pytest.mark.parametrize("name", sorted(set(PLANS) - {"workers of stages"}))
def test_the_chart_and_the_router_of_llm_d_take_values_and_weights(name: str) -> None:
    made = exported(PLANS[name], ExportTarget.LLM_D)
    for path, text in made.files.items():
        if path.startswith("values-"):
            values = yaml.safe_load(text)
            jsonschema.Draft202012Validator(schemas.VALUES).validate(values)
            [role] = [values[role] for role in ("prefill", "decode") if values[role]["create"]]
            container = {
                k: v for k, v in role["containers"][0].items() if k not in ("modelCommand", "mountModelVolume")
            }
            check_pod(
                {
                    "containers": [container],
                    **{field: role[field] for field in ("volumes", "tolerations", "enableServiceLinks")},
                    **role["extraConfig"],
                }
            )
    objects = list(yaml.safe_load_all(made.files["gateway.yaml"]))
    pools = [one["metadata"]["name"] for one in objects if one["kind"] == "InferencePool"]
    [route] = [one for one in objects if one["kind"] == "HTTPRoute"]
    assert [one["name"] for one in route["spec"]["rules"][0]["backendRefs"]] == pools
    for pool in pools:
        picker = yaml.safe_load(made.files[f"router/{pool}.yaml"])
        jsonschema.Draft202012Validator(schemas.PICKER).validate(picker)
        names = {plugin.get("name", plugin["type"]) for plugin in picker["plugins"]}
        for profile in picker["schedulingProfiles"]:
            assert {ref["pluginRef"] for ref in profile["plugins"]} <= names


@pytest.mark.parametrize(
    "name", sorted(set(PLANS) - WITH_WORKERS - {"copies that share experts", "prefill and decode"})
)
def test_ray_serve_takes_every_application(name: str) -> None:
    serve = yaml.safe_load(exported(PLANS[name], ExportTarget.RAY).files["serve.yaml"])
    jsonschema.Draft202012Validator(schemas.SERVE).validate(serve)


def test_a_field_that_operators_do_not_know_is_found() -> None:
    [one] = [
        o
        for o in reading.manifests(exported(PLANS["one GPU"], ExportTarget.LWS).files)
        if o["kind"] == "LeaderWorkerSet"
    ]
    one["spec"]["leaderWorkerTemplate"]["workersTemplate"] = {}
    with pytest.raises(jsonschema.ValidationError, match="workersTemplate"):
        check_object(one)
    del one["spec"]["leaderWorkerTemplate"]["workersTemplate"]
    one["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePolicy"):
        check_object(one)
