"""Entry point of `hetis-plan` and of ``python -m hetis.planner.cli``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from hetis.formats.command_line.process import command_process


def main() -> NoReturn:
    """Run the ``hetis-plan`` command. The base install has the command, but not the libraries that it needs."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when gRPC is imported; our errors say what its lines would
    with command_process():
        try:
            from hetis.planner.cli.app import main as run_and_exit
        except ModuleNotFoundError as error:
            if error.name not in ("typer", "rich"):
                raise
            sys.exit(f"hetis-plan needs {error.name}: pip install 'hetis[planner]'")
        run_and_exit()
