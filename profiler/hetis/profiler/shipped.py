"""The fitted profiles that come with the package, one for every GPU with published measurements.

``make profiles`` (``python -m tools.profiles``) makes them; ``docs/profiles.md`` says how wrong they are.
"""

from __future__ import annotations

import functools
import json
from importlib import resources

from hetis.formats.positions import parse_text
from hetis.formats.profile import parse_profile, profile_to_data
from hetis.solver.profile import Profile

FOLDER = "profiles"  # beside this module


@functools.cache
def shipped_profile(gpu: str) -> Profile | None:
    """The fitted profile of a GPU by its catalogue name; None when nobody measured it for us."""
    if gpu not in shipped_gpus():
        return None
    name = f"{gpu}.json"
    text = resources.files("hetis.profiler").joinpath(FOLDER, name).read_text(encoding="utf-8")
    return parse_profile(*parse_text(text, name))


@functools.cache
def shipped_gpus() -> tuple[str, ...]:
    """Catalogue names of the GPUs that have one, sorted."""
    folder = resources.files("hetis.profiler").joinpath(FOLDER)
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def profile_text(profile: Profile) -> str:
    """The text of a shipped file."""
    return json.dumps(profile_to_data(profile), indent=1, ensure_ascii=False) + "\n"
