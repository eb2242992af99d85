"""Versions of what makes a plan: hetis, Python, and the libraries whose release can change an answer."""

from __future__ import annotations

import platform
from importlib import metadata

LIBRARIES = ("numpy", "numba", "highspy", "ortools", "protobuf", "pydantic")


def installed_versions() -> dict[str, str]:
    """Name to version; a library that is not installed is left out."""
    versions = {"hetis": metadata.version("hetis"), "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions
