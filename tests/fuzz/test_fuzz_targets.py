"""Readers of untrusted input fail only as documented, on earlier findings and on mutations of them."""

from __future__ import annotations

import random
from contextlib import suppress
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.formats.documents import load_model, load_workload
from hetis.formats.errors import DocumentError
from tests.fuzz.mutating import failure_of, mutations
from tests.fuzz.targets import CORPUS, TARGETS, Target

INPUTS = 120
MANY_INPUTS = 20_000


@pytest.mark.parametrize("inputs", [INPUTS, pytest.param(MANY_INPUTS, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_fails_as_it_documents_or_not_at_all(name: str, inputs: int) -> None:
    for data in islice(mutations(TARGETS[name], name, random.Random(name)), inputs):
        if (error := failure_of(TARGETS[name], data)) is not None:
            raise AssertionError(f"{name} does not document this, for {data!r}") from error


def test_every_target_has_something_to_begin_with_and_no_other_is_kept() -> None:
    assert all(any(target.inputs(name)) for name, target in TARGETS.items())
    assert {path.name for path in CORPUS.iterdir()} <= TARGETS.keys()


def test_a_reader_that_is_broken_is_found() -> None:
    def broken(data: bytes) -> None:
        if b"\x00" in data:
            raise KeyError("nobody documents this")

    target = Target(read=broken, seeds=("tests/bad_input/cluster_*",))
    failures = (failure_of(target, data) for data in islice(mutations(target, "broken", random.Random(1)), 2000))
    assert any(isinstance(error, KeyError) for error in failures)


@settings(deadline=None)
@given(ref=st.text(max_size=40).filter(lambda text: "\0" not in text and text not in ("-", ".", "/", "..")))
def test_any_reference_is_found_or_refused(ref: str) -> None:
    for load in (load_model, load_workload):
        with suppress(DocumentError):
            load(ref)
