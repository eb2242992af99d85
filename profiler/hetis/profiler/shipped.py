"""The fitted profiles that come with the package, one for every GPU with published measurements.

``make profiles`` (``python -m tools.profiles``) creates them; ``docs/profiles.md`` states their errors.
"""

from __future__ import annotations

import functools
import json
from importlib import resources

from hetis.formats.positions import parse_text
from hetis.formats.profile import parse_profile, profile_to_data
from hetis.solver.profile import Profile

FOLDER = "profiles"  # next to this module


@functools.cache
def shipped_profile(gpu: str) -> Profile | None:
    """Return the fitted profile of a GPU by its catalogue name, or None if nobody measured it for us."""
    if gpu not in shipped_gpus():
        return None
    name = f"{gpu}.json"
    text = resources.files("hetis.profiler").joinpath(FOLDER, name).read_text(encoding="utf-8")
    return parse_profile(*parse_text(text, name))


@functools.cache
def shipped_gpus() -> tuple[str, ...]:
    """Return the catalogue names of the GPUs with a profile, sorted."""
    folder = resources.files("hetis.profiler").joinpath(FOLDER)
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def profile_text(profile: Profile) -> str:
    """Return the text of a shipped file."""
    return json.dumps(profile_to_data(profile), indent=1, ensure_ascii=False) + "\n"
