"""Finds profiles and GPU types by the names that users give, and writes profile files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hetis.formats.errors import DocumentError, single_problem
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Profile

_STAND_IN = "Ampere"


def profile_of(name: str) -> Profile:
    """Return the profile in a file, or the one that plans would use for a GPU type of the catalogue.

    Raises:
        DocumentError: the name is neither a file nor a GPU type, or the file is not a profile.
        InvalidProblemError: nothing is known about the GPU type.
    """
    from hetis.formats.catalogue import UnknownNameError, find_gpu
    from hetis.formats.profile import load_profile

    if name == "-" or Path(name).is_file():
        return load_profile(name)
    try:
        gpu = find_gpu(name).gpu
    except UnknownNameError as error:
        if Path(name).suffix or "/" in name:
            return load_profile(name)  # explains why it cannot be read
        raise single_problem(name, f"is neither a file nor a GPU type: {error}") from None
    from hetis.profiler.roofline import modelled_profile
    from hetis.profiler.shipped import shipped_profile

    return shipped_profile(gpu.name) or modelled_profile(gpu)


def gpu_type(name: str, cluster: Path | None) -> GpuType:
    """Return the GPU type ``name`` of a cluster file, or else of the catalogue.

    Raises:
        DocumentError: the file cannot be read, or neither has the type. The message says what to do.
    """
    from hetis.formats.catalogue import UnknownNameError, find_gpu
    from hetis.formats.cluster import load_cluster

    if cluster is not None:
        types = load_cluster(cluster).gpu_types
        if name in types:
            return types[name]
    try:
        return find_gpu(name).gpu
    except UnknownNameError as error:
        if cluster is not None:
            raise single_problem(str(cluster), f"defines no GPU type {name}, nor does the catalogue") from None
        raise DocumentError(
            single_problem(
                name,
                f"{error}; give the cluster file that defines it with --cluster (`run --cluster-out` writes one)",
            ).problems
        ) from None


def with_relative(gpu: GpuType) -> tuple[GpuType, bool]:
    """Return ``gpu`` with an architecture of known efficiency, and whether that is a stand-in.

    The processor of a host, or a type that a cluster file defines, may have none. Whatever was not measured is then
    modelled by the ratios of its peaks to those of the most common GPU.
    """
    from hetis.profiler.efficiency import shipped

    if gpu.architecture in shipped().architectures:
        return gpu, False
    return replace(gpu, architecture=_STAND_IN), True


def save_profile(path: Path, profile: Profile) -> None:
    """Write the whole file or nothing.

    Raises:
        DocumentError: it cannot be written.
    """
    from hetis.formats.documents import dump, write_atomically

    write_atomically(path, dump(profile, "yaml" if path.suffix in (".yaml", ".yml") else "json"))
