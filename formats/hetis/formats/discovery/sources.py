"""Whose output a fleet is read from; apart, so that the command's help loads no parser."""

from __future__ import annotations

from enum import StrEnum


class Source(StrEnum):
    """A tool that describes a fleet; ``auto``: whichever the file is of."""

    AUTO = "auto"
    KUBECTL = "kubectl"
    NVIDIA_SMI = "nvidia-smi"
    SLURM = "slurm"
    RAY = "ray"
    FILE = "file"
