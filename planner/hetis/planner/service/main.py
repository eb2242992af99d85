"""The entry point of `hetis-planner`. Nothing heavy is imported here, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import NoReturn

from hetis.commands.process import command_process
from hetis.planner.service.observability.handshakes import watched_handshakes

VERBS = {"audit", "backup", "migrate", "restore", "token", "--help", "-h", "--version", "--check", "--print-config"}


def main() -> NoReturn:
    """Run the command."""
    # gRPC reads its variables when it is imported. By default it writes lines of a form of its own.
    with watched_handshakes() if VERBS.isdisjoint(sys.argv) else nullcontext():
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        with command_process("hetis-planner", extra="planner"):
            from hetis.planner.service.command import run

            code = run(sys.argv[1:])
    from hetis.planner.threads import exit_process

    exit_process(code)


if __name__ == "__main__":
    main()
