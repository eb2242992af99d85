"""Export of plans as files for engines and orchestrators. What a target cannot express is reported.

The names of the targets are defined here, where they are quick to import for help and completion.
"""

from __future__ import annotations

from enum import StrEnum


class ExportTarget(StrEnum):
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


IN_KUBERNETES = frozenset(
    (ExportTarget.KUBERNETES, ExportTarget.LWS, ExportTarget.LLM_D, ExportTarget.KSERVE, ExportTarget.DYNAMO)
)
