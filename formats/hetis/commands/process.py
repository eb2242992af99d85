"""The process of a command, from before its imports to its end: streams that are there, and Ctrl-C without a traceback.

Nothing heavy is imported here, and no typer or rich: entry points of commands use this before they import the rest.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED = 130  # 128 plus the number of the signal, as in shells
# What a command imports first that the base install lacks, by the extra that has it.
_LIBRARIES = {"worker": ("torch", "numba")}
_OF_COMMAND_LINES = ("typer", "rich")


@contextmanager
def command_process(command: str, *, extra: str) -> Iterator[None]:
    """Run a whole command in the block: with all three standard streams, and so that Ctrl-C always ends it with 130.

    The base install has the ``command``, but not the libraries that it needs: those come with ``extra``.
    """
    open_closed_streams()
    try:
        with _ctrl_c_ends(), _naming_what_to_install(command, extra):
            yield
    finally:
        _discard_unwritten()


@contextmanager
def _ctrl_c_ends() -> Iterator[None]:
    """Let Ctrl-C end the process at once until `ctrl_c_raises`.

    What is imported before has nothing to clean up, and some of it would drop a KeyboardInterrupt. A SIGINT that the
    caller ignores or handles stays as it is.
    """
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    hook, sys.unraisablehook = sys.unraisablehook, _leave_if_interrupted
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the block, where there are files and calls to leave in order."""
    if signal.getsignal(signal.SIGINT) is not _leave:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)


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


def _discard_unwritten() -> None:
    """Put the null device in place of each output stream that takes no more: its disk is full, or its reader is gone.

    At exit Python writes once more what it has not written, and where that fails, too, the exit code is 120.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)


@contextmanager
def _naming_what_to_install(command: str, extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _LIBRARIES.get(extra, _OF_COMMAND_LINES):
            raise
        sys.exit(f"{command} needs {error.name}: pip install 'hetis[{extra}]'")


def descriptor_of_stderr() -> int:
    """Return the descriptor of ``sys.stderr``, for what a process writes as it ends at once.

    It is not always 2: the planner's 2 is a pipe to one of its threads, which never reads what is written last.
    """
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # none, not a file's, closed
        return 2


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    with suppress(OSError):  # whoever pressed Ctrl-C may have closed the terminal, too
        os.write(descriptor_of_stderr(), b"interrupted\n")
    os._exit(INTERRUPTED)


def _leave_if_interrupted(unraisable: UnraisableHookArgs) -> None:
    """End the process if Ctrl-C came in a callback, such as one of the import system, whose errors Python drops."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave(signal.SIGINT, None)
    sys.__unraisablehook__(unraisable)
