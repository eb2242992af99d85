"""The contract as protoc reads it: files with their comments, and the walks over them that the tests share."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"
SOURCES = sorted(path.relative_to(PROTO).as_posix() for path in (PROTO / "hetis" / "v1").glob("*.proto"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """Anything that has a comment."""

    kind: str  # message, field, enum, value, oneof, service or rpc
    name: str  # such as hetis.v1.Plan.name
    comment: str

    @property
    def text(self) -> str:
        """The comment without its line breaks."""
        return " ".join(self.comment.split())


@functools.cache
def files() -> tuple[descriptor_pb2.FileDescriptorProto, ...]:
    """Every file of the contract, as protoc reads it now, with its comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.bin"
        arguments = [f"-I{PROTO}", "--include_source_info", f"--descriptor_set_out={out}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments, *SOURCES], check=True)
        return tuple(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def messages() -> Iterator[tuple[str, descriptor_pb2.DescriptorProto]]:
    """Full name and descriptor of every message; map entries left out."""
    for file in files():
        for message in file.message_type:
            yield from _with_nested(f"{file.package}.{message.name}", message)


def enums() -> Iterator[tuple[str, descriptor_pb2.EnumDescriptorProto]]:
    """Full name and descriptor of every enum."""
    for file in files():
        yield from ((f"{file.package}.{enum.name}", enum) for enum in file.enum_type)
    for name, message in messages():
        yield from ((f"{name}.{enum.name}", enum) for enum in message.enum_type)


def services() -> Iterator[tuple[str, descriptor_pb2.ServiceDescriptorProto]]:
    """File name and descriptor of every service."""
    for file in files():
        yield from ((file.name, service) for service in file.service)


def things() -> Iterator[Thing]:
    """Everything that must have a comment."""
    for file in files():
        comments = {tuple(place.path): place.leading_comments.strip() for place in file.source_code_info.location}
        for i, message in enumerate(file.message_type):
            yield from _of_message(file.package, message, (4, i), comments)
        for i, enum in enumerate(file.enum_type):
            yield from _of_enum(file.package, enum, (5, i), comments)
        for i, service in enumerate(file.service):
            name = f"{file.package}.{service.name}"
            yield Thing(kind="service", name=name, comment=comments.get((6, i), ""))
            for j, method in enumerate(service.method):
                yield Thing(kind="rpc", name=f"{name}.{method.name}", comment=comments.get((6, i, 2, j), ""))


Comments = dict[tuple[int, ...], str]


def _of_message(
    scope: str, message: descriptor_pb2.DescriptorProto, path: tuple[int, ...], comments: Comments
) -> Iterator[Thing]:
    name = f"{scope}.{message.name}"
    if message.options.map_entry:
        return
    yield Thing(kind="message", name=name, comment=comments.get(path, ""))
    for i, field in enumerate(message.field):
        yield Thing(kind="field", name=f"{name}.{field.name}", comment=comments.get((*path, 2, i), ""))
    for i, oneof in enumerate(message.oneof_decl):
        if not oneof.name.startswith("_"):  # protoc makes one of every optional field
            yield Thing(kind="oneof", name=f"{name}.{oneof.name}", comment=comments.get((*path, 8, i), ""))
    for i, nested in enumerate(message.nested_type):
        yield from _of_message(name, nested, (*path, 3, i), comments)
    for i, enum in enumerate(message.enum_type):
        yield from _of_enum(name, enum, (*path, 4, i), comments)


def _of_enum(
    scope: str, enum: descriptor_pb2.EnumDescriptorProto, path: Sequence[int], comments: Comments
) -> Iterator[Thing]:
    name = f"{scope}.{enum.name}"
    yield Thing(kind="enum", name=name, comment=comments.get(tuple(path), ""))
    for i, value in enumerate(enum.value):
        yield Thing(kind="value", name=f"{name}.{value.name}", comment=comments.get((*path, 2, i), ""))


def _with_nested(
    name: str, message: descriptor_pb2.DescriptorProto
) -> Iterator[tuple[str, descriptor_pb2.DescriptorProto]]:
    if message.options.map_entry:
        return
    yield name, message
    for nested in message.nested_type:
        yield from _with_nested(f"{name}.{nested.name}", nested)
