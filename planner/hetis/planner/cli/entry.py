"""Entry point of `hetis-plan` and of ``python -m hetis.planner.cli``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from hetis.formats.command_line.process import command_process


def main() -> NoReturn:
    """Run the ``hetis-plan`` command; the base install has it too, but not the libraries it needs."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our errors say what its own lines do; read when it is imported
    with command_process():
        try:
            from hetis.planner.cli.app import main as run_and_exit
        except ModuleNotFoundError as error:
            if error.name not in ("typer", "rich"):
                raise
            sys.exit(f"hetis-plan needs {error.name}: pip install 'hetis[planner]'")
        run_and_exit()
