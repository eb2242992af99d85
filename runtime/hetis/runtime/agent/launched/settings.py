"""The file of ``--engine launch:FILE``: which engine serves the replicas of a node, and how it is started there.

apiVersion: hetis/v1 kind: EngineSettings engine: vllm model: /models/{name} addresses: {gpu1: 10.0.0.1, gpu2: 10.0.0.2}
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from hetis.engines.commands import WORKER_PORT
from hetis.engines.serving import DECIDED, KV_PORT, MASTER_PORT, names_of
from hetis.engines.starting import program_of
from hetis.engines.versions import Engine
from hetis.formats.endpoints import is_host
from hetis.formats.fields import DocumentPart, Duration
from hetis.formats.loading import read_data, validated

MASTER_STEP = 20  # ports of a replica on several nodes: SGLang takes those that follow its own for its processes
_MOST_GPUS = 64  # of a node, as far as ports are concerned
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _words(value: object) -> object:
    return shlex.split(value) if isinstance(value, str) else value


def _name(value: str) -> str:
    try:
        value.format(name="")
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ValueError(f"{value!r} may have {{name}} in it, the model's name in the plan, and nothing else") from None
    return value


def _checkpoint(value: str) -> str:
    try:
        value.format(name="", weights="")
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ValueError(
            f"{value!r} may have {{name}} and {{weights}} in it, the model's name and the precision of the replica's "
            "weights in the plan, and nothing else"
        ) from None
    return value


def _host(value: str) -> str:
    if not is_host(value):
        raise ValueError(f"{value!r} is no address, must be an IP address or a name")
    return value


def _variable(value: str) -> str:
    if not _VARIABLE.fullmatch(value):
        raise ValueError(f"{value!r} is no name of an environment variable")
    return value


Port = Annotated[int, Field(ge=1, le=65_535 - _MOST_GPUS)]
Named = Annotated[str, Field(min_length=1), AfterValidator(_name)]


class EngineSettings(DocumentPart):
    """The settings of engines on a node.

    Attributes:
        engine: that serves them.
        program: that starts the engine, as words or as a shell has it. Empty: as its makers have it.
        model: folder of the model, or a name that the engine knows; ``{name}`` is the model's name in the plan and
            ``{weights}`` the precision of the replica's weights.
        served_name: what clients call it.
        device: ``cpu`` to try a plan without GPUs.
        dtype: type of the model and its KV.
        options: further ones of the engine, as they stand.
        environment: further variables of the engine.
        addresses: of nodes, where the others and clients reach them. A node that is not here is reached where its agent
            says, or else by its own name.
        port: of the front of a replica whose first GPU is 0; that of a replica on GPU i is i higher.
        master_port, kv_port: likewise, where stages on several nodes meet (20 higher for each i), and where a prefill
            replica is asked for KV.
        worker_port: of a replica's first attention worker on a node; others have the next ones.
        key_file: of vLLM and its attention workers. None: drawn, where all of a replica is on one node.
        folder: for logs and files of the engine. None: `engines` in the agent's state directory.
        kv_tokens: KV room in tokens in place of the plan's, for smaller machines.
        ready_timeout: an engine that does not answer so long after its start is killed, and started again.
        silence_timeout: an engine that has answered, and does not any more for so long, likewise.
        router_delay: after being told to drain, a replica says that it takes nothing new only so much later: routers
            go on sending requests until they have heard.
        drain_timeout: how long requests that run may take until the engine is stopped.
    """

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["EngineSettings"]
    engine: Literal["vllm", "vllm-hetis", "sglang"]
    program: Annotated[list[str], BeforeValidator(_words)] = Field(default_factory=list)
    model: Annotated[str, Field(min_length=1), AfterValidator(_checkpoint)]
    served_name: Named = "{name}"
    device: Literal["cuda", "cpu"] = "cuda"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    options: Annotated[list[str], BeforeValidator(_words)] = Field(default_factory=list)
    environment: dict[Annotated[str, AfterValidator(_variable)], str] = Field(default_factory=dict)
    addresses: dict[str, Annotated[str, AfterValidator(_host)]] = Field(default_factory=dict)
    port: Port = 8000
    master_port: Annotated[int, Field(ge=1, le=65_535 - _MOST_GPUS * MASTER_STEP)] = MASTER_PORT
    kv_port: Port = KV_PORT
    worker_port: Port = WORKER_PORT
    key_file: str | None = None
    folder: str | None = None
    kv_tokens: Annotated[int, Field(ge=1)] | None = None
    ready_timeout: Annotated[Duration, Field(ge=1, le=86_400)] = 900.0
    silence_timeout: Annotated[Duration, Field(ge=1, le=3600)] = 60.0
    router_delay: Annotated[Duration, Field(ge=0, le=3600)] = 5.0
    drain_timeout: Annotated[Duration, Field(ge=0, le=3600)] = 120.0

    @property
    def served_by(self) -> Engine:
        return Engine(self.engine)

    @property
    def words(self) -> tuple[str, ...]:
        """The program that is the engine."""
        return tuple(self.program) or program_of(self.served_by)


def load_settings(path: Path) -> EngineSettings:
    """Read the settings in a file.

    Raises:
        DocumentError: with every problem, where it stands.
    """
    data, source = read_data(path)
    return validated(EngineSettings, data, source, to_value=lambda settings: settings, check=_contradictions)


def _contradictions(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield what is wrong with fields that are well-formed, as (path, message)."""
    try:
        words = _words(data.get("options"))
    except ValueError:
        return  # it is said already that these are no words
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        for name in sorted(names_of(words) & DECIDED):
            yield ("options",), f"{name} is no option to give the engine: the plan or these settings decide it"
        if words and not words[0].startswith("-"):
            yield ("options",), f"{words[0]!r} is no option of the engine, which begin with -"
