"""The options of `hetis-agent`, all checked before anything is started."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from hetis.formats.endpoints import is_loopback, split_address, split_endpoints
from hetis.runtime.agent.connecting import AgentOptionError

if TYPE_CHECKING:
    from hetis.runtime.agent.launched.settings import EngineSettings

_NODE = re.compile(r"clusters/[a-z0-9][a-z0-9-]{0,62}/nodes/[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


T = TypeVar("T")


class Checking:
    """Checks all options, so that all problems are reported at once."""

    def __init__(self) -> None:
        self._wrong: list[str] = []

    def get(self, check: Callable[[], T]) -> T | None:
        """Return the result of the check, or None if it finds a problem."""
        try:
            return check()
        except AgentOptionError as error:
            self._wrong += error.messages
            return None

    def finish(self) -> None:
        """Finish the checks.

        Raises:
            AgentOptionError: at least one check failed; it holds all messages.
        """
        if self._wrong:
            raise AgentOptionError(*self._wrong)


class EngineKind(StrEnum):
    SOCKET = "unix"
    VLLM = "vllm"
    SGLANG = "sglang"
    LAUNCH = "launch"
    SIMULATED = "simulated"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine next to the agent.

    Attributes:
        where: the path of a socket, the address of its metrics, or the file of its settings.
        settings: of engines that the agent starts itself.
    """

    kind: EngineKind
    where: str = ""
    settings: EngineSettings | None = None

    @classmethod
    def parse(cls, text: str) -> EngineChoice:
        """Parse ``unix:///path``, ``vllm:http://host:port``, ``sglang:http://host:port``, ``launch:/path``,
        ``simulated`` or ``none``.

        Raises:
            AgentOptionError: the text is none of these, or the file of the settings has problems; all of them.
        """
        head, _, rest = re.sub(r"^(vllm|sglang)\s+", r"\1:", text.strip()).partition(":")
        expected = (
            "unix:///path/engine.sock, vllm:http://127.0.0.1:8000, sglang:http://127.0.0.1:30000, "
            "launch:/path/engine.yaml, simulated or none"
        )
        match head:
            case "unix" if rest.startswith("/") and rest.strip("/"):
                return cls(EngineKind.SOCKET, "/" + rest.lstrip("/"))
            case "vllm" | "sglang" if rest:
                return cls(EngineKind(head), _metrics_url(rest))
            case "launch" if rest:
                return cls(EngineKind.LAUNCH, rest, _engine_settings(rest))
            case "simulated" | "none" if not rest:
                return cls(EngineKind(head))
        raise AgentOptionError(f"--engine is {text!r}, must be {expected}")


def _engine_settings(path: str) -> EngineSettings:
    from hetis.formats.errors import DocumentError
    from hetis.runtime.agent.launched.settings import load_settings

    try:
        return load_settings(Path(path))
    except DocumentError as error:
        raise AgentOptionError(*(f"--engine: {problem}" for problem in error.problems)) from None


def _metrics_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise AgentOptionError(f"--engine has the address {text!r}, must be http://host:port")
    return text if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/metrics"


def checked_node(text: str) -> str:
    if not text:
        raise AgentOptionError("--node is missing: clusters/CLUSTER/nodes/NODE")
    if not _NODE.fullmatch(text):
        raise AgentOptionError(f"--node is {text!r}, must be clusters/CLUSTER/nodes/NODE")
    return text


def checked_address(option: str, text: str) -> tuple[str, int]:
    """Return the host and port to listen on.

    Raises:
        AgentOptionError: the text is not ``host:port``.
    """
    try:
        return split_address(text, least_port=0)
    except ValueError:
        raise AgentOptionError(f"{option} is {text!r}, must be host:port such as 127.0.0.1:9470") from None


def checked_devices(source: str, *, engine: EngineChoice | None) -> str:
    """Check the source of devices. ``engine`` is the engine next to them, or None if it is unknown.

    Raises:
        AgentOptionError: there is no such source, or a simulated engine has no simulated devices.
    """
    from hetis.runtime.agent.devices import DevicesUnavailableError
    from hetis.runtime.agent.devices.simulated import SimulatedDevices
    from hetis.runtime.agent.devices.source import SOURCES

    kind, _, rest = source.partition(":")
    if kind == "simulated":
        try:
            SimulatedDevices.parse(rest)
        except DevicesUnavailableError as error:
            raise AgentOptionError(str(error)) from None
    elif kind not in ("auto", "nvml", "none") or rest:
        raise AgentOptionError(f"--devices is {source!r}, must be {SOURCES.replace('`', '')}")
    elif engine is not None and engine.kind is EngineKind.SIMULATED:
        raise AgentOptionError("--engine simulated needs --simulated-devices, such as A100-SXM-80GB:4")
    return source


def loopback_server(server: str) -> bool:
    """Return whether the planner is on this machine, where it listens without TLS by default."""
    try:
        return all(is_loopback(address) for address in split_endpoints(server))
    except ValueError:
        return False


def default_state_dir(home: str | None, node: str) -> Path:
    """Return a directory that differs for each node, so that several agents of a demonstration do not collide."""
    root = Path(home) if home else Path.home() / ".local" / "state"
    return root / "hetis" / "agent" / node.rpartition("/")[2]
