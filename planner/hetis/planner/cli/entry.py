"""Entry point of `hetis-plan` and of ``python -m hetis.planner.cli``."""

from __future__ import annotations

import os
from typing import NoReturn

from hetis.commands.process import command_process


def main() -> NoReturn:
    """Run the ``hetis-plan`` command."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when gRPC is imported; our errors say what its lines would
    with command_process("hetis-plan", extra="planner"):
        from hetis.planner.cli.app import main as run_and_exit

        run_and_exit()
