"""Text becomes plain data with line numbers, and no text can hang or crash the reader."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.errors import DocumentError
from hetis.formats.positions import parse_text, path_text

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=4))
def test_json_is_read_as_the_json_module_reads_it(value: dict[str, object]) -> None:
    assert parse_text(json.dumps(value), "x.json")[0] == value


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(min_value=-(10**30), max_value=10**30))
def test_numbers_are_exact_in_yaml_too(number: float) -> None:
    data, _ = parse_text(f"- {number!r}\n", "x")
    assert data == [number]
    assert type(data[0]) is type(number)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-9", 1e-9), ("no", "no"), ("12:30", "12:30"), ("true", True), ("~", None), ("'1'", "1"), ("010", 10)],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert parse_text(f"a: {text}", "x")[0] == {"a": value}


def test_values_know_their_lines_also_in_json() -> None:
    for text in ("a:\n  - b: 1\n    c: 2\n", '{"a":\n [{"b": 1,\n  "c": 2}]}'):
        _, source = parse_text(text, "x")
        assert source.locate(("a", 0, "c"))[0] == 3
        assert source.locate(("a", 0, "missing"))[0] == 2


def test_paths_are_written_as_people_write_them() -> None:
    assert path_text(("nodes", 1, "gpus", 0, "type")) == "nodes[1].gpus[0].type"


def test_an_alias_stands_for_its_anchor() -> None:
    assert parse_text("a: &x [1, 2]\nb: *x\n", "x")[0] == {"a": [1, 2], "b": [1, 2]}


def test_nesting_by_aliases_is_limited() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100)]
    with pytest.raises(DocumentError, match="larger than 64 levels of nesting once its aliases are expanded"):
        parse_text("\n".join(lines), "x")


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 100_000, "- " * 100_000, '{"a":' * 100_000, "? " * 100_000])
def test_endless_nesting_is_refused_at_once(text: str) -> None:
    start = time.process_time()
    with pytest.raises(DocumentError):
        parse_text(text, "x")
    assert time.process_time() - start < 20


def test_a_long_number_does_not_hang() -> None:
    with pytest.raises(DocumentError):
        parse_text('{"a": ' + "9" * 100_000 + "", "x")


@pytest.mark.parametrize("text", ["a: \udcff", "\n\udcff", "{\udcff}", "a: " + "x" * 300_000 + "\udcff"])
def test_bytes_of_the_environment_that_are_no_text_are_refused(text: str) -> None:
    with pytest.raises(DocumentError, match=r"is not text: character U\+DCFF is not allowed"):
        parse_text(text, "HETIS_RELOAD")
