"""Versions of hetis, Python, and the libraries whose releases can change a plan."""

from __future__ import annotations

import platform
from importlib import metadata

LIBRARIES = ("numpy", "numba", "highspy", "protobuf", "pydantic")


def installed_versions() -> dict[str, str]:
    """Return the versions by name, without libraries that are not installed."""
    versions = {"hetis": metadata.version("hetis"), "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions
