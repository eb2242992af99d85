"""Entry point of the ``hetis-profile`` command. The base install includes it, but not its dependencies."""

from __future__ import annotations

import sys
from typing import NoReturn

from hetis.formats.command_line.process import command_process


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    with command_process():
        try:
            from hetis.profiler.cli.app import main as run_and_exit
        except ModuleNotFoundError as error:
            if error.name not in ("typer", "rich"):
                raise
            sys.exit(f"hetis-profile needs {error.name}: pip install 'hetis[profiler]'")
        run_and_exit()
