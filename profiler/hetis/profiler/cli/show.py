"""``hetis-profile show``: shows a profile and how far it can be trusted."""

from __future__ import annotations

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.options import GpuOrFileArgument


@verb()
def show(terminal: Terminal, profile: GpuOrFileArgument) -> ProfileExitCode:
    """Show a profile: its pieces, where they are from, their error and the region they were measured in."""
    from hetis.profiler.cli.profile_table import origins, profile_document, profile_table
    from hetis.profiler.cli.profiles import profile_of

    found = profile_of(profile)
    terminal.emit(lambda: profile_document(found), lambda: profile_table(found, title=found.gpu))
    for line in origins(found):
        terminal.detail(line)
    return ProfileExitCode.OK
