"""Methods follow the AIPs: verbs, names of messages, what standard methods carry, and which may be retried."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, MethodDescriptorProto, MethodOptions

from tests.proto.descriptors import messages, services

STANDARD = {"Get", "List", "Create", "Update", "Delete"}  # AIP-131 to 135
# Custom methods (AIP-136): a verb other than the standard ones, then its object.
CUSTOM = {
    "Watch", "Cancel", "Explain", "Diff", "Read", "Activate", "Rollback", "Drain", "Undrain", "Solve",
    "Connect", "Disconnect", "Apply", "Reserve", "Copy", "Flip", "Release", "Abort",
}  # fmt: skip
MESSAGES = dict(messages())
METHODS = [(service.name, method) for _, service in services() for method in service.method]
IDS = [f"{service}.{method.name}" for service, method in METHODS]


def fields(type_name: str) -> dict[str, str]:
    """Names of a message's fields and their types."""
    return {field.name: field.type_name.rpartition(".")[2] for field in message(type_name).field}


def message(type_name: str) -> DescriptorProto:
    return MESSAGES[type_name.removeprefix(".")]


def standard(verb: str) -> Iterator[tuple[str, MethodDescriptorProto]]:
    for _, method in METHODS:
        if method.name.startswith(verb):
            yield method.name.removeprefix(verb), method


def test_one_service_per_file_named_after_it() -> None:
    seen = [file for file, _ in services()]
    assert len(seen) == len(set(seen)) == 6
    for file, service in services():
        snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", service.name).lower()
        assert file == f"hetis/v1/{snake}.proto"


@pytest.mark.parametrize(("service", "method"), METHODS, ids=IDS)
def test_method_is_a_verb_and_a_noun_with_messages_of_its_own(service: str, method: MethodDescriptorProto) -> None:
    match = re.fullmatch(r"([A-Z][a-z]+)([A-Z][A-Za-z]+)", method.name)
    assert match, method.name
    assert match[1] in STANDARD | CUSTOM, f"{service}.{method.name}: {match[1]} is no known verb"
    assert method.input_type == f".hetis.v1.{method.name}Request"
    assert method.output_type == f".hetis.v1.{method.name}Response"


def test_get_takes_a_name_and_returns_the_resource() -> None:
    for resource, method in standard("Get"):
        assert "name" in fields(method.input_type), method.name
        assert resource in fields(method.output_type).values(), method.name


def test_list_pages() -> None:
    for _, method in standard("List"):
        assert {"page_size", "page_token"} <= fields(method.input_type).keys(), method.name
        answer = message(method.output_type)
        assert answer.field[0].label == answer.field[0].LABEL_REPEATED
        assert answer.field[1].name == "next_page_token"


def test_create_is_idempotent_and_returns_the_resource() -> None:
    for resource, method in standard("Create"):
        snake = resource.lower()
        assert {f"{snake}_id", snake, "request_id", "validate_only"} <= fields(method.input_type).keys(), method.name
        assert fields(method.output_type) == {snake: resource}


def test_update_takes_a_mask_and_the_resource_has_the_etag() -> None:
    for resource, method in standard("Update"):
        taken = fields(method.input_type)
        assert taken["update_mask"] == "FieldMask"
        assert resource in taken.values()
        assert "etag" in fields(f".hetis.v1.{resource}")
        assert "request_id" in taken


@pytest.mark.parametrize("verb", ["Delete", "Cancel", "Activate", "Rollback", "Drain", "Undrain"])
def test_changes_of_a_resource_can_be_conditional_and_retried(verb: str) -> None:
    found = list(standard(verb))
    assert found
    for _, method in found:
        assert {"name", "etag", "request_id"} <= fields(method.input_type).keys(), method.name


@pytest.mark.parametrize(("service", "method"), METHODS, ids=IDS)
def test_every_method_says_whether_it_may_be_retried(service: str, method: MethodDescriptorProto) -> None:
    level = method.options.idempotency_level
    if method.client_streaming:
        assert level == MethodOptions.IDEMPOTENCY_UNKNOWN
    elif re.match("Get|List|Watch|Explain|Diff|Read|Solve", method.name):
        assert level == MethodOptions.NO_SIDE_EFFECTS
    else:
        assert level == MethodOptions.IDEMPOTENT


def test_the_agent_has_one_stream_in_both_directions() -> None:
    (method,) = [method for service, method in METHODS if service == "AgentService"]
    assert method.client_streaming
    assert method.server_streaming


@pytest.mark.parametrize(("service", "method"), METHODS, ids=IDS)
def test_everything_that_changes_an_engine_is_fenced(service: str, method: MethodDescriptorProto) -> None:
    if service == "ExecutorService" and method.options.idempotency_level == MethodOptions.IDEMPOTENT:
        assert message(method.input_type).field[0].name == "epoch"
