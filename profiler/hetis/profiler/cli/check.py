"""``hetis-profile check``: whether a profile is fit to plan with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.options import ClusterOption, GpuOrFileArgument

if TYPE_CHECKING:
    from rich.console import RenderableType


@verb()
def check(
    terminal: Terminal,
    profile: GpuOrFileArgument,
    cluster: ClusterOption = None,
) -> ProfileExitCode:
    """Check a profile: its form, rates no GPU of that type can reach, memory it lacks, errors and regions.

    What is impossible ends with exit code 2; what is merely doubtful is a warning.
    """
    from rich.text import Text

    from hetis.profiler.cli.doubts import doubts_of, impossible
    from hetis.profiler.cli.profiles import gpu_type, profile_of
    from hetis.solver.errors import HetisError

    found = profile_of(profile)
    doubts = list(doubts_of(found))
    broken: list[str] = []
    try:
        broken = list(impossible(found, gpu_type(found.gpu, cluster)))
    except HetisError:
        if cluster is not None:
            raise
        doubts.append(f"{found.gpu} is not in the catalogue: rates and memory were not checked (--cluster FILE)")
    for doubt in doubts:
        terminal.warn(doubt)

    def table() -> RenderableType:
        if broken:
            return Text("\n".join(f"broken: {sentence}" for sentence in broken), style="red")
        return Text(f"the profile of {found.gpu} holds: {len(found.fits)} fits, {len(doubts)} doubts", style="green")

    terminal.emit(lambda: {"ok": not broken, "broken": broken, "doubts": doubts}, table)
    return ProfileExitCode.INVALID if broken else ProfileExitCode.OK
