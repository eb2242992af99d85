"""The entry point of `hetis-planner`. Nothing heavy is imported here, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from hetis.commands.process import command_process


def main() -> NoReturn:
    """Run the command."""
    # gRPC reads this when it is imported. It would write a line in a form of its own for each handshake that fails.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with command_process("hetis-planner", extra="planner"):
        from hetis.planner.service.command import run

        code = run(sys.argv[1:])
    from hetis.planner.threads import exit_process

    exit_process(code)


if __name__ == "__main__":
    main()
