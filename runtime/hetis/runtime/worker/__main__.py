"""Entry point of `hetis-worker` and of ``python -m hetis.runtime.worker``."""

from __future__ import annotations

import sys
from typing import NoReturn

from hetis.commands.process import command_process


def main() -> NoReturn:
    """Run an attention worker in this process and exit."""
    with command_process("hetis-worker", extra="worker"):
        from hetis.runtime.worker.main import main as run

        sys.exit(run())


if __name__ == "__main__":
    main()
