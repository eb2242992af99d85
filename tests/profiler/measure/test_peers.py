"""Two processes that exchange messages: requests, answers, and losses. The peers here are fakes without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hetis.profiler.measure.peers import PeerProcesses, PeersLostError

ANSWERS = """
import json, sys
if sys.argv[1] == "0":
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"seconds": request["num_bytes"] * request["count"] * 1e-9}), flush=True)
"""
DIES = "import sys; sys.exit('no route to peer')"


def command(tmp_path: Path, program: str) -> list[str]:
    path = tmp_path / "peer.py"
    path.write_text(program)
    return [sys.executable, str(path)]


def test_requests_are_answered_in_turn(tmp_path: Path) -> None:
    with PeerProcesses(("cpu", "cpu"), command(tmp_path, ANSWERS)) as peers:
        peers.wait_until_ready()
        assert peers.timer("transfer", 1000)(5) == pytest.approx(5e-6)
        assert peers.timer("all_reduce", 2000)(1) == pytest.approx(2e-6)


def test_a_peer_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with (
        PeerProcesses(("cpu", "cpu"), command(tmp_path, DIES)) as peers,
        pytest.raises(PeersLostError, match="no route to peer"),
    ):
        peers.wait_until_ready()
