"""The engines that can run a plan, and the version of each whose options and variables are used.

`tests/engines/recorded.py` lists the options and variables of every version, with their sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Engine(StrEnum):
    """The engine of a replica. ``vllm-hetis`` is vLLM with our plugin: head groups may be on attention workers."""

    VLLM_HETIS = "vllm-hetis"
    VLLM = "vllm"
    SGLANG = "sglang"

    @property
    def program(self) -> str:
        """The name for people, which is also the name of its processes."""
        return "SGLang" if self is Engine.SGLANG else "vLLM"


VERSIONS: Mapping[Engine, str] = {Engine.VLLM_HETIS: "0.32.0", Engine.VLLM: "0.32.0", Engine.SGLANG: "0.5.23"}
