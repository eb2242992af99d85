"""Makes the stubs of `hetis.v1` from its .proto files, beside them: ``python proto/generate.py [--out DIR]``.

The same files with the same tools give the same stubs, byte for byte; tests/proto/test_stubs.py holds the committed
ones to that. The tools are pinned in constraints.txt: stubs name the protobuf and grpcio that they need at least.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent
PACKAGE = "hetis/v1"
STUBS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Writes the stubs of every .proto file below ``out`` and removes what is left of files that are gone.

    Raises:
        SystemExit: protoc found a mistake, which it has printed, or a tool is missing.
    """
    (out / PACKAGE).mkdir(parents=True, exist_ok=True)
    for pattern in STUBS:
        for path in (out / PACKAGE).glob(pattern):
            path.unlink()
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).glob("*.proto"))
    # Only services get gRPC stubs: the others would import grpc for nothing.
    services = [name for name in sources if name.endswith("_service.proto")]
    _protoc([f"--python_out={out}", f"--mypy_out=quiet:{out}"], sources)
    _protoc([f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"], services)


def _protoc(options: Sequence[str], sources: Sequence[str]) -> None:
    plugins = [f"--plugin=protoc-gen-{name}={_plugin(name)}" for name in ("mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *plugins, *options, *sources]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("protoc failed")


def _plugin(name: str) -> Path:
    """The plugin's program beside this interpreter, wherever PATH points."""
    path = Path(sys.executable).parent / f"protoc-gen-{name}"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: pip install -c constraints.txt -e '.[dev]' brings mypy-protobuf")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, help="stubs go to hetis/v1 below it (default: proto/)")
    generate(parser.parse_args().out)
