"""Entry point of `hetis-agent` and of ``python -m hetis.runtime.agent``."""

from __future__ import annotations

import sys
from typing import NoReturn

from hetis.commands.process import command_process


def main() -> NoReturn:
    """Run the agent's command line in this process and exit."""
    with command_process("hetis-agent", extra="agent"):
        from hetis.runtime.agent.main import main as run

        sys.exit(run())


if __name__ == "__main__":
    main()
