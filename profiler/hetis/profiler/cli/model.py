"""``hetis-profile model``: models the profile of an unmeasured GPU."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.options import ClusterOption, ProfileOutOption


@verb()
def model(
    terminal: Terminal,
    gpu: Annotated[str, typer.Argument(metavar="GPU", help="A GPU type of the catalogue or of --cluster.")],
    out: ProfileOutOption,
    cluster: ClusterOption = None,
) -> ProfileExitCode:
    """Model a GPU without measurements from its nearest measured relative, by the ratios of their peaks.

    The error of an operator is what leaving out one measured GPU at a time costs: docs/profiles-modelled.md.
    """
    from hetis.profiler.cli.profile_table import profile_document, profile_table
    from hetis.profiler.cli.profiles import gpu_type, save_profile
    from hetis.profiler.roofline import modelled_profile

    profile = modelled_profile(gpu_type(gpu, cluster))
    save_profile(out, profile)
    document: dict[str, Any] = {"out": str(out)} | profile_document(profile)
    terminal.emit(lambda: document, lambda: profile_table(profile, title=f"{profile.gpu} -> {out}"))
    return ProfileExitCode.OK
