"""Entry point of the ``hetis-profile`` command."""

from __future__ import annotations

from typing import NoReturn

from hetis.commands.process import command_process


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    with command_process("hetis-profile", extra="profiler"):
        from hetis.profiler.cli.app import main as run_and_exit

        run_and_exit()
