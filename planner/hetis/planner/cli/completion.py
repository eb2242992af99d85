"""``hetis-plan completion SHELL``: the script that completes the command line."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@verb(prints_data=False)
def completion(
    terminal: Terminal,
    shell: Annotated[Shell, typer.Argument(help="The shell the script is for.")],
) -> ExitCode:
    """Print a completion script: `source <(hetis-plan completion bash)`."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # imported there, not exported

    sys.stdout.write(
        get_completion_script(prog_name="hetis-plan", complete_var="_HETIS_PLAN_COMPLETE", shell=shell.value) + "\n"
    )
    return ExitCode.OK
