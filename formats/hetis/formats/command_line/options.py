"""Options that every verb of every command has."""

from __future__ import annotations

from typing import Annotated

import typer

from hetis.formats.command_line.terminal import OutputFormat

OutputOption = Annotated[OutputFormat, typer.Option("--output", "-o", help="Form of the data on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only on stderr.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="More detail on stderr.")]
NoColorOption = Annotated[bool, typer.Option("--no-color", help="Plain text; so does NO_COLOR=1.")]
