"""``hetis-plan doctor``: whether this installation can plan, and how fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from rich.console import RenderableType


@verb()
def doctor(terminal: Terminal) -> ExitCode:
    """Check this installation: Python, solver libraries and their order, the compiler's cache, the machine."""
    from hetis.planner.cli.installation import Verdict, examine

    findings = examine()

    def table() -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        styles = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "bold red"}
        grid = Table.grid(padding=(0, 2))
        for finding in findings:
            grid.add_row(Text(finding.verdict, style=styles[finding.verdict]), finding.subject, Text(finding.detail))
        return grid

    terminal.emit(
        lambda: [{"subject": f.subject, "verdict": f.verdict.value, "detail": f.detail} for f in findings], table
    )
    return ExitCode.INTERNAL if any(f.verdict is Verdict.FAILED for f in findings) else ExitCode.OK
