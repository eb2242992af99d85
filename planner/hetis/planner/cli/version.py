"""``hetis-plan version``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from rich.console import RenderableType


@verb()
def version(terminal: Terminal) -> ExitCode:
    """Print the versions of hetis and of the libraries that decide a plan."""
    from hetis.planner.use_cases.versions import installed_versions

    versions = installed_versions()

    def table() -> RenderableType:
        from rich.text import Text

        return Text("\n".join(f"{name} {number}" for name, number in versions.items()))

    terminal.emit(lambda: versions, table)
    return ExitCode.OK
