"""An engine's settings that are not in the layout, and where its processes connect."""

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
    """An engine's settings that are not in the layout.

    Attributes:
        model: as the engine takes it, a folder or a name.
        program: the engine. If its last word is not ``serve``, it is the module of vLLM's front end.
        options: of the engine, verbatim.
        dtype: of model and KV; ``auto`` leaves it to the engine.
        device: ``cuda`` or ``cpu``.
        limits_kv: the ranks take no more memory for KV than planned.
        executor: Unix socket for the node's agent. Empty: nobody steers the engine.
        served_name: the clients' name for the model. Empty: ``model``.
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
        """Return whether one of these is among the verbatim options."""
        return bool(names_of(self.options) & set(names))

    def dtype_of(self, common: str) -> str:
        """Return the dtype to tell the engine, if that of its GPUs is ``common``: the user's goes first."""
        return common if self.dtype == "auto" and self.device == "cuda" else self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """The address where an engine's processes on several nodes connect, and the port that serves KV of a prefill
    replica.
    """

    host: str
    port: int = MASTER_PORT
    kv_port: int = KV_PORT


def names_of(options: Sequence[str]) -> set[str]:
    """Return the option names among these words, which may be written with _ for -, and with = and a value."""
    return {word.partition("=")[0].replace("_", "-") for word in options if word.startswith("-")}


def drain_s(options: Sequence[str]) -> float:
    """Return the seconds that vLLM gives running requests when it is told to end."""
    words = [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for name, value in itertools.pairwise(words):
        if name.replace("_", "-") == "--shutdown-timeout" and value.isdecimal():
            return float(value)
    return 0.0


def joined(host: str, port: int) -> str:
    """Return an address as one word."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
