"""Equal data have equal bytes in any order, and addresses are parsed in one place."""

from __future__ import annotations

import hashlib

import pytest

from hetis.commands.endpoints import split_address
from hetis.formats.files import canonical_json, content_digest


def test_equal_data_have_equal_bytes_and_digests() -> None:
    data, same = {"b": [1, 2.5, None], "a": "ü"}, {"a": "ü", "b": [1, 2.5, None]}
    assert canonical_json(data) == canonical_json(same) == '{"a":"ü","b":[1,2.5,null]}'.encode()
    assert content_digest(b"{}") == f"sha256:{hashlib.sha256(b'{}').hexdigest()}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"value": value})


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("host:1", ("host", 1)),
        ("[::1]:8470", ("::1", 8470)),
        ("::1:80", ("::1", 80)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address) == expected


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "[]:80", "host:0", "host:65536", "host:-1", "host:١"])
def test_anything_else_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="is not an address, expected HOST:PORT"):
        split_address(address)


def test_port_0_is_for_those_who_listen() -> None:
    assert split_address("host:0", least_port=0) == ("host", 0)
