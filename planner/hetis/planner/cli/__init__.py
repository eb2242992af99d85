"""The `hetis-plan` command line: one module per verb, `app` ties them together.

Nothing heavy is imported at the top of these modules: ``hetis-plan --help`` must answer at once.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of the ``hetis-plan`` command; the base install has it too, but not what it needs."""
    try:
        from hetis.planner.cli.app import main as run_and_exit
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"hetis-plan needs {error.name}: pip install 'hetis[planner]'")
    run_and_exit()
