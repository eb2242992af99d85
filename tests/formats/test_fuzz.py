"""Loading a file with arbitrary bytes gives a value or a DocumentError."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetis.formats.documents import (
    load,
    load_cluster,
    load_model,
    load_plan,
    load_profile,
    load_requests,
    load_state,
    load_workload,
)
from hetis.formats.errors import DocumentError
from hetis.formats.positions import parse_text

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SEED = (EXAMPLES / "paper.yaml").read_bytes()
LOADERS = [load, load_cluster, load_model, load_workload, load_profile, load_plan, load_state, load_requests]
YAMLISH = st.text("{}[]:,-&*!|>'\"%@`#?\n\t ab01.~<=", max_size=60)
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome(load: Callable[[], object]) -> str:
    """Return the result, never empty; any error other than `DocumentError` fails the test."""
    try:
        return f"value {load()}"
    except DocumentError as error:
        return str(error)


@pytest.mark.parametrize("name", ["x.yaml", "x.json", "x.csv", "x.csv.gz"])
@relaxed
@given(content=st.binary(max_size=200) | YAMLISH.map(str.encode) | st.text(max_size=100).map(str.encode))
def test_random_content(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for loader in LOADERS:
        assert outcome(partial(loader, path))


@relaxed
@given(st.integers())
def test_a_valid_file_with_bytes_changed(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    content = bytearray(SEED)
    for _ in range(generator.randint(1, 8)):
        position = generator.randrange(len(content))
        match generator.randrange(3):
            case 0:
                content[position] = generator.randrange(256)
            case 1:
                del content[position : position + generator.randint(1, 10)]
            case _:
                content[position:position] = bytes([generator.choice(b"{}[]:,-&*!|'\"\n\t #")])
    path = tmp_path / "x.yaml"
    path.write_bytes(bytes(content))
    assert outcome(partial(load_cluster, path))


@relaxed
@given(ref=st.text(max_size=40).filter(lambda text: "\0" not in text and text not in ("-", ".", "/", "..")))
def test_any_reference_is_found_or_refused(ref: str) -> None:
    for loader in (load_model, load_workload):
        assert outcome(partial(loader, ref))


@given(YAMLISH)
def test_any_text_is_read_or_refused(text: str) -> None:
    assert outcome(partial(parse_text, text, "x"))
