"""The tools that a fleet can be read from, in their own module so that the command's help loads no parser."""

from __future__ import annotations

from enum import StrEnum


class Source(StrEnum):
    """A tool that describes a fleet. ``auto`` recognises the tool by its file."""

    AUTO = "auto"
    KUBECTL = "kubectl"
    NVIDIA_SMI = "nvidia-smi"
    SLURM = "slurm"
    NVML = "nvml"
    RAY = "ray"
    AGENTS = "agents"
    FILE = "file"
