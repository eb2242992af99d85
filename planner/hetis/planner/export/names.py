"""The targets by name: light to import, for help and completion."""

from __future__ import annotations

from enum import StrEnum


class Target(StrEnum):
    """What a plan is exported to."""

    VLLM = "vllm"
    SGLANG = "sglang"
    COMPOSE = "compose"
    KUBERNETES = "kubernetes"
    LWS = "lws"
    LLM_D = "llm-d"
    KSERVE = "kserve"
    DYNAMO = "dynamo"
    RAY = "ray"
    SLURM = "slurm"
    HETIS_LAUNCH = "hetis-launch"


class Device(StrEnum):
    """What engines compute on."""

    CUDA = "cuda"
    CPU = "cpu"
