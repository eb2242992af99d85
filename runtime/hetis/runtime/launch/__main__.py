"""Entry point of `hetis-launch` and of ``python -m hetis.runtime.launch``."""

from __future__ import annotations

import sys
from typing import NoReturn

from hetis.commands.process import command_process


def main() -> NoReturn:
    """Run the launcher's command line in this process and exit."""
    with command_process("hetis-launch", extra="launch"):
        from hetis.runtime.launch.main import main as run

        sys.exit(run())


if __name__ == "__main__":
    main()
