"""Readers of untrusted input fail only as documented, on earlier findings and on some hundred mutations of them.

`python -m tests.fuzz.run` continues for any time, and follows the code's branches if atheris is installed.
"""

from __future__ import annotations

import random
import sys
from itertools import islice
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.mutating import failure_of, mutations
from tests.fuzz.targets import CORPUS, TARGETS, Target

INPUTS = 120


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_fails_as_it_documents_or_not_at_all(name: str) -> None:
    for data in islice(mutations(TARGETS[name], name, random.Random(name)), INPUTS):
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


MERGE = """
import pathlib, sys
flag, first, second = sys.argv[1:]
assert flag == "-merge=1"
for path in pathlib.Path(second).iterdir():
    if b"old" not in path.read_bytes():
        (pathlib.Path(first) / ("m" + path.name)).write_bytes(path.read_bytes())
"""


def test_what_a_fuzzer_grew_is_kept_within_bounds_in_place_of_what_was_kept_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libFuzzer's part is faked: every input that is not "old" reaches new code."""
    seeds, grown, corpus = tmp_path / "seeds", tmp_path / "grown", tmp_path / "corpus"
    for folder in (seeds, grown, corpus / "text"):
        folder.mkdir(parents=True)
    (seeds / "0").write_bytes(b"a seed")
    (corpus / "text" / "a seed").write_bytes(b"a seed")
    (corpus / "text" / "found-1").write_bytes(b"a finding")
    (corpus / "text" / "grown-1").write_bytes(b"old")
    (grown / "1").write_bytes(b"old")
    for number in range(40):
        (grown / f"new{number}").write_bytes(b"x" * (number + 1))
    (grown / "large").write_bytes(b"y" * (run.MOST_GROWN_BYTES + 1))
    monkeypatch.setattr(run, "CORPUS", corpus)
    assert run.keep_grown("text", [sys.executable, "-c", MERGE], seeds=seeds, grown=grown) == run.MOST_GROWN
    kept = {path.name.partition("-")[0]: path.read_bytes() for path in (corpus / "text").iterdir()}
    assert kept.keys() == {"a seed", "found", "grown"}
    sizes = sorted(path.stat().st_size for path in (corpus / "text").glob("grown-*"))
    assert sizes == list(range(1, run.MOST_GROWN + 1))  # the shortest
