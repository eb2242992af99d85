"""The output of native libraries stays off stdout."""

from __future__ import annotations

import ctypes
import os

import pytest

from hetis.planner.cli.searching import no_native_output


def test_lines_of_native_code_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    print("before")
    with no_native_output():
        libc.puts(b"printed by C")
        os.write(1, b"written to the descriptor\n")
    print("data")
    out, err = capfd.readouterr()
    assert out == "before\ndata\n"
    assert err == ""


def test_stdout_is_restored_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), no_native_output():
        raise RuntimeError("the search failed")
    os.write(1, b"data\n")
    assert capfd.readouterr().out == "data\n"
