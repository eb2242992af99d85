"""Files and processes of a replica on this machine, without vLLM."""

from __future__ import annotations

import ctypes
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

import pytest

from hetis.engines.commands import Command
from hetis.engines.errors import OptionError
from hetis.engines.layout import Process, ProcessKind
from hetis.runtime.launch.processes import Started, prepare, start, write_file

_PR_SET_CHILD_SUBREAPER = 36


def command(*shown: str, secret: str = "") -> Command:
    process = Process(name="vllm", kind=ProcessKind.SERVER, stage=0, node="n", gpus=(), kv_bytes=1)
    return Command(process=process, shown=shown, secrets=(secret,) if secret else ())


@contextmanager
def full_disk() -> Iterator[None]:
    """Files cannot grow meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_key_that_a_full_disk_does_not_take_is_drawn_once_there_is_room(tmp_path: Path) -> None:
    """An empty file used to be left, and refused at every later start."""
    key = tmp_path / "keys" / "worker.key"
    with full_disk(), pytest.raises(OptionError, match=r"worker\.key: File too large"):
        prepare([command(secret=str(key))], may_draw_key=True)
    assert list(key.parent.iterdir()) == []
    found = prepare([command(secret=str(key))], may_draw_key=True)
    assert found == {str(key): key.read_text()}
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert prepare([command(secret=str(key))], may_draw_key=True) == found


def test_a_file_that_is_written_again_is_whole_and_as_secret_as_it_must_be(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("what was here before")
    file.chmod(0o644)
    link.symlink_to(file)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write_file(str(link), "new", mode=0o600)
    assert file.read_text() == "what was here before"
    write_file(str(link), "new", mode=0o600)
    assert file.read_text() == "new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert link.is_symlink()


@contextmanager
def process_one() -> Iterator[None]:
    """Orphans among the descendants of this process become its children, as they do of process 1 in a container."""
    set_flag = ctypes.CDLL(None).prctl
    assert set_flag(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        set_flag(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def exit_code_of(started: Started) -> int | None:
    """Return the exit code of a process that ends within a minute."""
    until_s = monotonic() + 60
    while (found := started.poll()) is None and monotonic() < until_s:
        sleep(0.01)
    return found


def members(group: int) -> list[str]:
    """Return the processes of a group, ended ones included, by their lines in /proc."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            line = file.read_text()
            if line.rpartition(")")[2].split()[2] == str(group):
                found.append(line)
    return found


def test_as_process_1_we_leave_no_zombies_and_every_process_its_exit_code() -> None:
    with process_one():
        others = start(command("sh", "-c", "exit 5"))
        for code in range(3):
            started = start(command("sh", "-c", f"sleep 600 & sleep 600 & (sleep 600 & sleep 600) & exit {code}"))
            assert exit_code_of(started) == code
            until_s = monotonic() + 60
            while members(started.pid) and monotonic() < until_s:
                sleep(0.01)
            assert members(started.pid) == []
        assert exit_code_of(others) == 5
