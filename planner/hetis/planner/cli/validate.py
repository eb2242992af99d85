"""``hetis-plan validate FILE...``: every problem of every file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from rich.console import RenderableType


@verb()
def validate(
    terminal: Terminal,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Documents of any kind; - is standard input.")],
) -> ExitCode:
    """Check files and list every problem with its file, line, path and the nearest valid name."""
    from hetis.planner.use_cases.json_values import json_value
    from hetis.planner.use_cases.validate import validate_file

    results = [validate_file(file) for file in files]

    def table() -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for result in results:
            mark = Text("bad", style="red") if result.problems else Text("ok", style="green")
            count = f"{len(result.problems)} problem{'' if len(result.problems) == 1 else 's'}"
            grid.add_row(
                mark, Text(result.file, overflow="fold"), result.kind or "", count if result.problems else result.name
            )
        return grid

    for result in results:
        for problem in result.problems:
            terminal.line(str(problem))
    terminal.emit(lambda: [{"ok": not result.problems, **json_value(result)} for result in results], table)
    return ExitCode.INVALID if any(result.problems for result in results) else ExitCode.OK
