"""docs/api.md has the status code of every reason, and names fields that exist."""

from __future__ import annotations

import re

from tests.proto.descriptors import ROOT, enums, messages, things

TEXT = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
ENUMS = dict(enums())


def values(enum: str) -> list[str]:
    """Return the names of an enum's values without prefix, except the zero value."""
    descriptor = ENUMS[f"hetis.v1.{enum}"]
    prefix = descriptor.value[0].name.removesuffix("UNSPECIFIED")
    return [value.name.removeprefix(prefix) for value in descriptor.value[1:]]


def test_every_reason_is_in_the_table_under_its_status_code() -> None:
    text = TEXT[TEXT.index("| Code | Reasons") :].partition("\n\n")[0]
    table = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE))
    rows = {reason: codes for codes, reasons in table.items() for reason in re.findall(r"`([A-Z_]+)`", reasons)}
    assert set(values("ErrorReason")) <= rows.keys()
    for thing in things():
        code = re.match(r"\[([A-Z_]+)\]", thing.text)
        if thing.kind == "value" and code:
            assert code[1] in rows[thing.name.rpartition("_REASON_")[2]], thing.name


def test_fields_that_uphold_invariants_exist() -> None:
    rows = TEXT[TEXT.index("| | Invariant") :].partition("\n\n")[0]
    known = {name.removeprefix("hetis.v1."): {field.name for field in message.field} for name, message in messages()}
    named = re.findall(r"`([A-Z][A-Za-z]+)\.([a-z_]+)`", rows)
    assert named
    for message, field in named:
        assert field in known[message], f"{message}.{field}"
