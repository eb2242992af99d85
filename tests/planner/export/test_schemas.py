"""What is exported is accepted by those who read it: their own parsers, or schemas of their objects."""

from __future__ import annotations

import json
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
import yaml

from hetis.planner.export.names import Target
from tests.planner.export import reading
from tests.planner.export.plans import PLANS
from tests.planner.export.test_export import exported

VERSION = kubernetes_validate.latest_version()
IN_PODS = sorted(set(PLANS) - {"workers of stages"})  # where cards serve several ranks each


def check_core(one: dict[str, Any]) -> None:
    """An object of Kubernetes itself, by its own schema, in which nothing unknown may stand."""
    kubernetes_validate.validate(one, VERSION, strict=True)


@pytest.mark.parametrize("name", IN_PODS)
def test_kubernetes_takes_every_object(name: str) -> None:
    made = exported(PLANS[name], Target.KUBERNETES, namespace="serving")
    found = reading.manifests(made.files)
    assert {"Service", "StatefulSet", "NetworkPolicy"} <= {one["kind"] for one in found}
    for one in found:
        check_core(one)
        assert one["metadata"]["namespace"] == "serving"
    listed = yaml.safe_load(made.files["kustomization.yaml"])
    assert sorted(listed["resources"]) == sorted(made.shown)


@pytest.mark.parametrize("name", PLANS)
def test_compose_takes_every_file(name: str) -> None:
    made = exported(PLANS[name], Target.COMPOSE)
    for path in made.shown:
        whole = yaml.safe_load(made.files[path])
        compose = compose_spec.PyCompose.from_json(json.dumps(whole))
        compose.validate()
        assert sorted(compose.service_names()) == sorted(whole["services"])


def test_what_compose_does_not_know_is_found() -> None:
    made = exported(PLANS["one GPU"], Target.COMPOSE)
    whole = yaml.safe_load(made.files["a/compose.yaml"])
    whole["services"]["r0-vllm"]["restart"] = "sometimes"
    with pytest.raises(ValueError, match="unknown variant `sometimes`"):
        compose_spec.PyCompose.from_json(json.dumps(whole)).validate()
