"""Everything in the contract is explained, and every field's comment states the meaning of its zero value."""

from __future__ import annotations

import re

import grpc
import pytest

from tests.proto.descriptors import Thing, enums, files, services, things

THINGS = list(things())
# The phrases with which a field's comment explains the zero value.
ZERO = re.compile(
    r"\b(0|from 0|none|empty|unset|false|UNSPECIFIED)\b|\bRequired\b|Always (set|above 0)|only grows", re.I
)
# Fields of these types need a unit, unless they are counts, indices, ids or versions.
UNITS = ("_s", "_bytes", "_hz", "_w", "_c", "_rps", "_ratio", "_bytes_per_s")


def test_everything_has_a_comment() -> None:
    assert [thing.name for thing in THINGS if not thing.comment] == []


@pytest.mark.parametrize("kind", ["message", "field", "enum", "value", "service", "rpc", "oneof"])
def test_the_walk_sees_every_kind(kind: str) -> None:
    assert any(thing.kind == kind for thing in THINGS)


def test_every_field_says_what_its_zero_value_means() -> None:
    silent = [
        thing.name for thing in THINGS if thing.kind == "field" and not _in_oneof(thing) and not ZERO.search(thing.text)
    ]
    assert silent == []


def test_every_floating_point_field_ends_in_its_unit_or_says_that_it_has_none() -> None:
    plain = {
        "value",
        "attainment",
        "share",
        "bound",
        "gap",
        "incumbent",
        "limit",
        "dual",
        "gap_target",
        "held_out_mape",
        "other_value",
        "worth",
        "keep",
    }
    plain |= {"kv_thresholds", "high_water", "short_blocks_before", "short_blocks_after", "payback_steps"}
    plain |= {"arrivals", "cached_tokens", "prompt_tokens", "output_tokens", "counts", "total", "gain", "usd_per_h"}
    plain |= {"kv_bytes_per_token", "exchange_bytes_per_head", "compute_capability", "gpu_memory_utilization"}
    for file in files():
        for message in file.message_type:
            for field in message.field:
                if field.type in (field.TYPE_DOUBLE, field.TYPE_FLOAT):
                    assert field.name.endswith(UNITS) or field.name in plain, f"{message.name}.{field.name}"


def test_comments_are_sentences_that_fit_the_page() -> None:
    for thing in THINGS:
        assert re.match(r"[A-Z`\[0-9]", thing.comment), f"{thing.name}: {thing.comment!r}"
        assert thing.comment.endswith("."), f"{thing.name}: {thing.comment!r}"
        assert all(len(line) <= 120 for line in thing.comment.splitlines()), thing.name


def test_every_enum_begins_with_unspecified() -> None:
    for name, enum in enums():
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper()
        assert enum.value[0].number == 0, name
        assert enum.value[0].name == f"{prefix}_UNSPECIFIED", name
        assert all(value.name.startswith(f"{prefix}_") for value in enum.value), name
        assert not enum.options.allow_alias, name


def test_every_rpc_names_only_reasons_that_exist() -> None:
    known = {thing.name.rpartition("_REASON_")[2] for thing in THINGS if "ERROR_REASON_" in thing.name}
    others = {"FLIPPED", "ABORTED", "OK", "UNAVAILABLE", "PLANNER"}
    for thing in THINGS:
        if thing.kind == "rpc":
            said = re.split("[Ff]ails with", thing.text, maxsplit=1)[-1]
            named = set(re.findall(r"\b[A-Z]{2,}(?:_[A-Z]+)*\b", said))
            assert named - others <= known, thing.name


def test_every_reason_says_its_status_code_or_where_it_is_found() -> None:
    for thing in THINGS:
        if "ERROR_REASON_" in thing.name and not thing.name.endswith("UNSPECIFIED"):
            code = re.match(r"\[([A-Z_]+)\] ", thing.text)
            assert "only" in thing.text if code is None else code[1] in grpc.StatusCode.__members__, thing.name


def test_unary_rpcs_of_the_planner_say_how_they_fail_and_who_may_call() -> None:
    for file, service in services():
        for method in service.method:
            (thing,) = [t for t in THINGS if t.name == f"hetis.v1.{service.name}.{method.name}"]
            if method.name not in ("ListClusters", "WatchReports"):
                assert "ails with" in thing.text, thing.name
            if file.rpartition("/")[2] in ("cluster_service.proto", "plan_service.proto", "profile_service.proto"):
                assert "Role " in thing.text, thing.name


def _in_oneof(thing: Thing) -> bool:
    """Return whether a field is in a oneof, where its zero value is a value like others."""
    scope, _, field_name = thing.name.rpartition(".")
    for file in files():
        for message in file.message_type:
            if f"{file.package}.{message.name}" == scope:
                (field,) = [field for field in message.field if field.name == field_name]
                return field.HasField("oneof_index") and not field.proto3_optional
    return False
