"""What an engine is told beside the layout, and where its processes meet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

SERVE = ("vllm", "serve")
MASTER_PORT, KV_PORT = 29501, 5600
DECIDED = frozenset(
    (
        *("--model", "--model-path", "--served-model-name", "--host", "--port", "--dtype"),
        *("--tensor-parallel-size", "-tp", "--tp-size", "--pipeline-parallel-size", "-pp", "--pp-size"),
        *("--nnodes", "-n", "--node-rank", "-r", "--master-addr", "--master-port", "--dist-init-addr", "--headless"),
        *("--distributed-executor-backend", "--kv-transfer-config", "--attention-backend"),
        *("--disaggregation-mode", "--disaggregation-transfer-backend", "--disaggregation-bootstrap-port"),
        *("--kv-cache-dtype", "--kv-cache-memory-bytes", "--max-total-tokens"),
    )
)
"""Options of engines that follow from the plan, or from settings of ours; users may give all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What an engine is told beside the layout.

    Attributes:
        model: as the engine takes it, a folder or a name.
        program: that is the engine; vLLM's is its module of the front alone where the last word is not ``serve``.
        options: of the engine as they stand.
        dtype: of model and KV; ``auto`` as the engine has it.
        device: ``cuda`` or ``cpu``.
        limits_kv: the ranks take no more memory for KV than the plan counts on.
        executor: Unix socket for the node's agent; empty: nobody steers the engine.
        served_name: what clients call the model; empty: ``model``.
    """

    model: str
    program: tuple[str, ...] = SERVE
    options: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str = "cuda"
    limits_kv: bool = False
    executor: str = ""
    served_name: str = ""

    def gives(self, *names: str) -> bool:
        """Whether one of these is among the options as they stand."""
        return bool(names_of(self.options) & set(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the processes of an engine on several nodes meet, and where a prefill replica is asked for KV."""

    host: str
    port: int = MASTER_PORT
    kv_port: int = KV_PORT


def names_of(options: Sequence[str]) -> set[str]:
    """Names of options among these words, which may be written with _ for -, and with = and a value."""
    return {word.partition("=")[0].replace("_", "-") for word in options if word.startswith("-")}


def drain_s(options: Sequence[str]) -> float:
    """Seconds that vLLM lets running requests take when it is told to end."""
    words = [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for name, value in itertools.pairwise(words):
        if name.replace("_", "-") == "--shutdown-timeout" and value.isdecimal():
            return float(value)
    return 0.0


def joined(host: str, port: int) -> str:
    """An address as one word."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
