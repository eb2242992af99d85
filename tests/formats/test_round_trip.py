"""value -> document -> text -> document -> value gives the identical value, for every kind and both text forms."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetis.formats import documents
from hetis.formats.documents import (
    digest,
    dump,
    dump_data,
    from_data,
    json_schema,
    kind_of,
    load,
    load_plan,
    load_workload,
    to_data,
    yaml_text,
)
from hetis.formats.errors import DocumentError
from hetis.formats.positions import parse_text
from hetis.solver.plan import (
    AttentionWorkerPool,
    Objective,
    ObjectiveKind,
    Plan,
    ReplicaPlan,
    SolveResult,
    StagePlan,
    Status,
)
from hetis.solver.workload import Workload

from . import strategies

thorough = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.mark.parametrize("form", ["yaml", "json"])
@thorough
@given(value=strategies.VALUES)
def test_text_gives_the_identical_value_back(form: Literal["yaml", "json"], value: documents.Value) -> None:
    data, _ = parse_text(dump(value, form), "text")
    assert from_data(data) == value
    assert to_data(from_data(data)) == data


@thorough
@given(strategies.VALUES)
def test_a_self_contained_document_gives_the_identical_value_back(value: documents.Value) -> None:
    data = to_data(value, self_contained=True)
    back = from_data(json.loads(json.dumps(data)))
    assert back == value
    assert digest(back) == digest(value)


@thorough
@given(strategies.VALUES)
def test_documents_fit_their_json_schema(value: documents.Value) -> None:
    validator = VALIDATORS[kind_of(value)]
    validator.validate(to_data(value))
    validator.validate(to_data(value, self_contained=True))


VALIDATORS = {kind: jsonschema.Draft202012Validator(json_schema(kind)) for kind in documents.KINDS}


@pytest.mark.parametrize("kind", documents.KINDS)
def test_a_json_schema_is_valid_and_refuses_unknown_fields(kind: str) -> None:
    schema = json_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["title"] == kind
    assert schema["additionalProperties"] is False
    assert not VALIDATORS[kind].is_valid({"apiVersion": "hetis/v1", "kind": kind, "surprise": 1})


@pytest.mark.parametrize("kind", documents.KINDS)
def test_defaults_in_a_json_schema_are_values_that_a_file_may_have(kind: str) -> None:
    """`pcie: 32000000000.0`, copied from the reference, was refused for its missing unit."""
    schema = json_schema(kind)
    for part in (schema, *schema.get("$defs", {}).values()):
        for name, field in part.get("properties", {}).items():
            if field.get("default") is not None:
                one = jsonschema.Draft202012Validator({**field, "$defs": schema.get("$defs", {})})
                assert one.is_valid(field["default"]), (name, field)


def test_a_json_schema_has_no_zero_where_files_may_not_have_it() -> None:
    gpu = json_schema("Cluster")["$defs"]["GpuTypePart"]["properties"]
    for name in ("memory", "memory_bandwidth", "fp16", "pcie"):
        assert not jsonschema.Draft202012Validator(gpu[name]).is_valid(0), name
    assert VALIDATORS["Cluster"].is_valid(
        {
            "apiVersion": "hetis/v1",
            "kind": "Cluster",
            "name": "c",
            "nodes": [{"name": "n", "gpus": [{"type": "L4"}]}],
            "network": {"bandwidth": "1Gbps", "latency": 0},
        }
    )


def test_an_unknown_kind_has_no_schema() -> None:
    with pytest.raises(DocumentError, match=r"unknown kind 'Clusters', expected one of .*, did you mean Cluster\?"):
        json_schema("Clusters")


OF_TENANTS = {
    "Tenants": {
        "tenants": [
            {"name": "x", "model": "M", "workload": "W", "worth": 2.0, "ttft": "none", "tpot": "50ms"},
            {"name": "y", "model": "M", "workload": "W", "worth": 1.0, "objective": "throughput"},
        ]
    },
}


@pytest.mark.parametrize("kind", OF_TENANTS)
def test_files_of_tenants_are_written_with_all_they_say(kind: str) -> None:
    value = from_data({"apiVersion": "hetis/v1", "kind": kind, **OF_TENANTS[kind]})
    assert kind_of(value) == kind
    assert from_data(to_data(value)) == value
    VALIDATORS[kind].validate(to_data(value))


def a_plan(kind: ObjectiveKind, **result: float) -> Plan:
    numbers = {"value": 1.0, "bound": 1.0, "gap": 0.0} | result
    solved = SolveResult(status=Status.FEASIBLE, objective=kind, unit="requests/s", solve_s=1.0, **numbers)
    return Plan(strategy="hetis", family="f", result=solved, objective=Objective(kind=kind), replicas=())


@pytest.mark.parametrize(
    ("kind", "bound"), [(ObjectiveKind.GOODPUT, math.inf), (ObjectiveKind.COST, -math.inf)], ids=lambda x: str(x)
)
def test_a_missing_bound_is_null_in_json(tmp_path: Path, kind: ObjectiveKind, bound: float) -> None:
    plan = a_plan(kind, bound=bound, gap=math.inf)
    (tmp_path / "plan.json").write_text(dump(plan, "json"))
    result = json.loads((tmp_path / "plan.json").read_text())["result"]
    assert (result["bound"], result["gap"]) == (None, None)
    assert load_plan(tmp_path / "plan.json") == plan


def test_a_plan_of_a_time_before_roles_is_unified(tmp_path: Path) -> None:
    stage = StagePlan(gpu="L4", tp=1, copies=1, first_layer=0, num_layers=2, devices=("a/0",), kv_head_groups_kept=8)
    pool = AttentionWorkerPool(stage=0, gpu="L4", devices=("a/1",), kv_head_groups=1)
    replica = ReplicaPlan(
        rate=1.0, ttft_s=1.0, tpot_s=0.1, micro_batch=1, in_flight=1, chunk_tokens=256, kv_tokens=100,
        stages=(stage,), attention_workers=(pool,),
    )  # fmt: skip
    plan = replace(a_plan(ObjectiveKind.GOODPUT), replicas=(replica,))
    data = json.loads(dump(plan, "json"))
    del data["kv_routes"]
    for part, names in (
        (data["replicas"][0], ("role", "kv_zones")),
        (data["replicas"][0]["attention_workers"][0], ("shared",)),
    ):
        for name in names:
            del part[name]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert load_plan(tmp_path / "plan.json") == plan


def test_a_plan_without_a_value_is_null_in_json(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(dump(a_plan(ObjectiveKind.GOODPUT, value=math.nan), "json"))
    assert math.isnan(load_plan(tmp_path / "plan.json").result.value)


def test_inputs_that_json_cannot_hold_are_refused() -> None:
    plan = a_plan(ObjectiveKind.GOODPUT)
    for inputs in ({"x": math.inf}, {"x": object()}):
        with pytest.raises(ValueError, match=r"JSON"):
            dump(replace(plan, inputs=inputs), "json")


def test_infinity_in_inputs_of_a_yaml_plan_is_refused_with_its_place(tmp_path: Path) -> None:
    text = dump(replace(a_plan(ObjectiveKind.GOODPUT), inputs={"x": [1.0]})).replace("- 1.0", "- .inf")
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(DocumentError, match=r"inputs\.x\[0\]: is \.inf, must be finite"):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "1e5",
        "0x10",
        "12:30",
        "~",
        "null",
        "1_000",
        ".5",
        "- a",
        "a: b",
        "2024-01-01",
        "a\x85b",
        "\u2028",
        " a\n b",
    ],
)
def test_text_that_looks_like_something_else_stays_text_in_yaml(text: str) -> None:
    assert parse_text(dump_data({"a": text}), "x")[0] == {"a": text}


@pytest.mark.parametrize("text", ["y", "Y", "n", "N", "0o17", "-0o1_7", "1e5", "on"])
def test_text_that_other_readers_of_yaml_take_for_a_boolean_or_number_is_quoted(text: str) -> None:
    """PyYAML reads some of them as text, but go-yaml, which kubectl uses, does not."""
    assert yaml_text({text: [text]}) == f"'{text}':\n- '{text}'\n"
    assert yaml_text({"yes, no": ["nn", "0o8", "yy"]}) == "yes, no:\n- nn\n- 0o8\n- yy\n", "no quotes without need"


def test_the_kind_of_a_document_is_found(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(dump(load_workload("8000/300")))
    assert isinstance(load(tmp_path / "w.yaml"), Workload)
    with pytest.raises(DocumentError, match="kind is missing, expected one of Cluster, ModelSpec, Workload, Profile"):
        from_data({"apiVersion": "hetis/v1"})
    with pytest.raises(DocumentError, match=r"kind: is 'Clutser', expected one of .*, did you mean Cluster\?"):
        from_data({"kind": "Clutser"})
    for empty in (None, [], 3):
        with pytest.raises(DocumentError):
            from_data(empty)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_document_with_anything_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    """Replacing a random part of a valid document by random data gives a value or a DocumentError."""
    document = to_data(data.draw(strategies.VALUES))
    junk = strategies.JSON_VALUES | st.sampled_from([10**400, -1, 0, float("inf"), float("nan"), "", "-1GB", True])
    here: Any = document
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(here[key], dict | list) and here[key] and data.draw(st.booleans()):
            here = here[key]
            continue
        here[key] = data.draw(junk)
        break
    with contextlib.suppress(DocumentError):
        assert to_data(from_data(document))
