"""The profile of a GPU type if the user passes no file: the fitted one in the package, or else a modelled one.

There is a fitted profile for every GPU with published measurements. ``make profiles`` (``python -m tools.profiles``)
creates them; ``docs/accuracy.md`` states their errors.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from importlib import resources

from hetis.formats import catalogue
from hetis.formats.positions import parse_text
from hetis.formats.profile import parse_profile, profile_to_data
from hetis.profiler.engines import for_engine
from hetis.profiler.roofline import modelled_profile
from hetis.solver.cluster import GpuType
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Profile

FOLDER = "profiles"  # next to this module
MODELLED = "modelled"
FITTED = "fitted"  # shipped with hetis, fitted to published measurements
HOST = "vllm"  # the engine whose times default profiles have


def default_profile(gpu: GpuType) -> tuple[str, Profile]:
    """Return the origin and the profile of a GPU type without a file.

    All have the times of vLLM, whatever engine a plan is for, so that plans for different engines can be compared:
    the time of its host per iteration, and its kernels of experts, latent and linear attention (docs/accuracy.md).

    A type that a cluster declares under a catalogue name but with other peaks or memory is modelled: the shipped
    profile is for another card. With other peaks it is modelled as a card of which nothing was measured.

    Raises:
        InvalidProblemError: no profile is shipped, and none can be modelled.
    """
    origin, kernels = _kernels_of(gpu)
    return origin, for_engine(kernels, gpu, HOST)


def profile_origin(gpu: GpuType) -> str | None:
    """Return the origin of `default_profile`, or None if there is no profile."""
    try:
        return _kernels_of(gpu)[0]
    except InvalidProblemError:
        return None


def _kernels_of(gpu: GpuType) -> tuple[str, Profile]:
    """Return the origin and the profile without an engine's times."""
    try:
        listed = replace(catalogue.find_gpu(gpu.name).gpu, usd_per_hour=gpu.usd_per_hour)
    except catalogue.UnknownNameError:
        listed = None
    if listed == gpu and (shipped := shipped_profile(gpu.name)) is not None:
        return FITTED, shipped
    if listed is None or _peaks_of(listed) == _peaks_of(gpu):
        return MODELLED, modelled_profile(gpu)
    unmeasured = modelled_profile(replace(gpu, name=f"{gpu.name} of the cluster"))
    return MODELLED, replace(unmeasured, gpu=gpu.name)


def _peaks_of(gpu: GpuType) -> tuple[str, float, float, float | None]:
    return gpu.architecture, gpu.mem_bytes_per_s, gpu.fp16_flops, gpu.fp8_flops


@functools.cache
def shipped_profile(gpu: str) -> Profile | None:
    """Return the fitted profile of a GPU by its catalogue name, or None if there are no measurements of it."""
    if gpu not in shipped_gpus():
        return None
    name = f"{gpu}.json"
    text = resources.files("hetis.profiler").joinpath(FOLDER, name).read_text(encoding="utf-8")
    return parse_profile(*parse_text(text, name))


@functools.cache
def shipped_gpus() -> tuple[str, ...]:
    """Return the catalogue names of the GPUs with a fitted profile, sorted."""
    folder = resources.files("hetis.profiler").joinpath(FOLDER)
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def profile_text(profile: Profile) -> str:
    """Return the text of a shipped file."""
    return json.dumps(profile_to_data(profile), indent=1, ensure_ascii=False) + "\n"
