"""The profile of a GPU type that nobody measured here: the shipped one, or else a modelled one."""

from __future__ import annotations

from dataclasses import replace

from hetis.formats import catalogue
from hetis.profiler.engines import for_engine
from hetis.profiler.roofline import modelled_profile
from hetis.profiler.shipped import shipped_profile
from hetis.solver.cluster import GpuType
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Profile

MODELLED = "modelled"
FITTED = "fitted"  # shipped with hetis, fitted to published measurements
HOST = "vllm"  # the engine whose times default profiles have


def default_profile(gpu: GpuType) -> tuple[str, Profile]:
    """Return the origin and the profile of a GPU type without a file.

    All have the times of vLLM, whatever engine a plan is for, so that plans for different engines can be compared:
    what its host takes of an iteration, and its kernels of experts and latent attention (docs/accuracy.md).

    A type that a cluster declares under a catalogue name but with other peaks or memory is modelled: the shipped
    profile is for another card.

    Raises:
        InvalidProblemError: none is shipped and none can be modelled.
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
    if _is_of_catalogue(gpu) and (shipped := shipped_profile(gpu.name)) is not None:
        return FITTED, shipped
    return MODELLED, modelled_profile(gpu)


def _is_of_catalogue(gpu: GpuType) -> bool:
    try:
        listed = catalogue.find_gpu(gpu.name).gpu
    except catalogue.UnknownNameError:
        return False
    return replace(listed, usd_per_hour=gpu.usd_per_hour) == gpu
