"""The process of a command: standard streams that are there."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Put the null device in place of each standard stream that the caller closed, as in ``hetis-plan ... >&-``.

    Python has None for it, which nothing expects. The next file to be opened would get its number, and with it what
    native libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null == number:
                os.set_inheritable(number, True)  # as standard streams are
            else:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
