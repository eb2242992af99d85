"""Discovery of a fleet from the output of other tools: it becomes a cluster, with reasons for everything left out.

``reading`` recognises which tool wrote a file, a reader for each turns its output into `FoundNode` values, and
``fleet`` finds the GPU types that product names mean and builds the cluster. This module loads no parser, so that the
command's help is quick.
"""

from __future__ import annotations

from enum import StrEnum


class FleetSource(StrEnum):
    """A tool that describes a fleet. ``auto`` recognises the tool by its file."""

    AUTO = "auto"
    KUBECTL = "kubectl"
    NVIDIA_SMI = "nvidia-smi"
    AMD_SMI = "amd-smi"
    SLURM = "slurm"
    NVML = "nvml"
    RAY = "ray"
    AGENTS = "agents"
    FILE = "file"
