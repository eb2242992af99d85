"""``hetis-profile check``: is a profile one to plan with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hetis.profiler.cli.exit_codes import ExitCode
from hetis.profiler.cli.options import ClusterOption
from hetis.profiler.cli.terminal import Terminal
from hetis.profiler.cli.verb import verb

if TYPE_CHECKING:
    from rich.console import RenderableType


@verb()
def check(
    terminal: Terminal,
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="A profile file, or - for standard input.")],
    cluster: ClusterOption = None,
) -> ExitCode:
    """Check a profile file: its form, rates no GPU of that type can reach, memory it lacks, errors and regions.

    What is impossible ends with exit code 2; what is merely doubtful is a warning.
    """
    from rich.text import Text

    from hetis.formats.profile import load_profile
    from hetis.profiler.cli.doubts import doubts_of, impossible
    from hetis.profiler.cli.profiles import gpu_type
    from hetis.solver.errors import HetisError

    found = load_profile(profile)
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
    return ExitCode.INVALID if broken else ExitCode.OK
