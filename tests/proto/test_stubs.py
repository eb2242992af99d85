"""The committed stubs are those of the .proto files, and all of them can be imported."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.proto.descriptors import PROTO, SOURCES

STUBS = PROTO / "hetis" / "v1"


def test_stubs_are_fresh(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PROTO / "generate.py", "--out", tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "hetis" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in STUBS.glob("*_pb2*")}
    assert made.keys() == committed.keys(), "run `make proto`"
    assert [name for name in made if made[name] != committed[name]] == [], "run `make proto`"


@pytest.mark.parametrize("source", SOURCES)
def test_every_file_can_be_imported_from_the_package(source: str) -> None:
    stem = Path(source).stem
    module = importlib.import_module(f"hetis.v1.{stem}_pb2")
    assert source == module.DESCRIPTOR.name
    if stem.endswith("_service"):
        stubs = importlib.import_module(f"hetis.v1.{stem}_pb2_grpc")
        (service,) = module.DESCRIPTOR.services_by_name
        assert hasattr(stubs, f"{service}Stub")


def test_messages_alone_do_not_import_grpc() -> None:
    program = (
        "import sys; sys.modules['grpc'] = None; from hetis.v1 import plan_service_pb2, agent_service_pb2, failure_pb2"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
