"""Durable state of an agent survives kills, and damage costs only the damaged part."""

from __future__ import annotations

import logging
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.runtime.agent.disk import StateDirectory, StateError
from hetis.runtime.agent.replica_state import ReplicaState
from tests.runtime.agent.builders import REPLICA, Bench, Planner, change


def opened(path: Path) -> dict[str, bytes]:
    directory = StateDirectory(path)
    try:
        return directory.read()
    finally:
        directory.close()


def test_parts_are_read_back_and_only_this_user_may(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "state")
    directory.write(REPLICA, b"one")
    directory.write("node", b"\x00\n\xff")
    directory.write("gone", b"x")
    directory.write("gone", None)
    directory.close()
    assert opened(tmp_path / "state") == {REPLICA: b"one", "node": b"\x00\n\xff"}
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in (tmp_path / "state").iterdir())


@pytest.mark.parametrize(("other", "mode"), [("of-others", 0o755), ("node.state", 0o700), ("lost+found", 0o700)])
def test_a_directory_keeps_its_mode_if_it_is_not_the_agents_alone(
    other: str, mode: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    path.mkdir()
    path.chmod(0o755)
    (path / other).mkdir()
    for _ in range(2):  # the second time with the files of the first
        directory = StateDirectory(path)
        directory.write(REPLICA, b"one")
        directory.close()
        assert stat.S_IMODE(path.stat().st_mode) == mode
    warned = f"state directory {path} keeps its mode, since it also holds other files: {other}"
    assert [found.message for found in caplog.records] == ([warned] * 2 if mode == 0o755 else [])


@given(st.data())
def test_a_damaged_part_is_set_aside_and_the_others_are_used(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("state")
    directory = StateDirectory(path)
    directory.write("a", b"first part")
    directory.write("b", b"second part")
    directory.close()
    file = path / "a.state"
    content = file.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    damaged = data.draw(
        st.sampled_from([content[:cut], content[:cut] + bytes([content[cut] ^ 1]) + content[cut + 1 :]])
    )
    file.write_bytes(damaged)
    found = opened(path)
    assert found["b"] == b"second part"
    if "a" in found:  # for example a flipped bit in the blanks of the header
        assert found["a"] == b"first part"
    else:
        assert (path / "a.state.damaged-0").read_bytes() == damaged


def test_damage_is_said_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.state").write_bytes(b"nonsense")
    with caplog.at_level(logging.ERROR):
        assert opened(tmp_path) == {}
    assert "a.state is damaged" in caplog.text
    assert "moved to a.state.damaged-0" in caplog.text


def test_two_agents_do_not_share_a_directory(tmp_path: Path) -> None:
    first = StateDirectory(tmp_path)
    with pytest.raises(StateError, match="is in use by another agent"):
        StateDirectory(tmp_path)
    first.close()
    opened(tmp_path)


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(StateError, match=r"state directory .*: Not a directory|File exists"):
        StateDirectory(tmp_path / "file")


@pytest.mark.parametrize("killed_at", ["open", "write", "fsync", "rename", "sync"])
def test_a_writer_that_is_killed_leaves_the_old_or_the_new_part(tmp_path: Path, killed_at: str) -> None:
    """The process kills itself before each system call of a write, so that the machine's load does not decide where."""
    program = f"""
import os, signal
from pathlib import Path
from hetis.runtime.agent.disk import StateDirectory

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

class Half:
    def __init__(self, descriptor, _mode):
        self.descriptor = descriptor

    def __enter__(self):
        return self

    def __exit__(self, *_):
        die()

    def write(self, content):
        os.write(self.descriptor, content[: len(content) // 2])
        die()

directory = StateDirectory(Path({str(tmp_path)!r}))
directory.write("part", b"old" * 5000)
from hetis.runtime.agent import disk
match {killed_at!r}:
    case "open":
        disk.open = die
    case "write":
        disk.open = Half
    case "fsync":
        os.fsync = die
    case "rename":
        Path.rename = die
    case "sync":
        directory._sync = die
directory.write("part", b"new" * 5000)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "part.state.new").exists() == (killed_at != "sync")
    assert opened(tmp_path) == {"part": (b"new" if killed_at == "sync" else b"old") * 5000}
    assert not list(tmp_path.glob("*.new"))


def test_a_held_replica_is_the_same_after_a_round_trip() -> None:
    bench = Bench()
    bench.connect()
    bench.hear(Planner().assign())
    bench.hear(Planner().prepare(change()))
    (held,) = bench.core.held()
    body = held.to_bytes(clock="boot-1")
    assert ReplicaState.from_bytes(body, clock="boot-1").to_bytes(clock="boot-1") == body
    (kept,) = ReplicaState.from_bytes(body, clock="boot-2").changes.values()
    assert kept.deadline_s == float("-inf")


def test_a_part_that_checks_but_says_nonsense_is_named_and_the_epoch_is_not_lost() -> None:
    bench = Bench()
    bench.connect(epoch=6)
    bench.hear(Planner(6).assign())
    bench.disk["node"] = b"{}"
    bench.boot()
    assert set(bench.core.damaged) == {"node"}
    assert bench.core.newest_epoch == 6  # the epoch of the assignment
    bench.disk[REPLICA] = b"\xff"
    bench.boot()
    assert set(bench.core.damaged) == {"node", REPLICA}
