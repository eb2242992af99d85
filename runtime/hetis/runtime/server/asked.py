"""What the options of `hetis-serve` say of who moves heads; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class RedispatchMode(StrEnum):
    """Who decides that heads of running requests move.

    ``own``: the engine, with the solver in its process. ``planner``: the planner, through the agent. ``off``: nobody;
    the engine still moves single heads away from a device that is full, rather than preempt.
    """

    OWN = "own"
    PLANNER = "planner"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptAddresses:
    """Between engines that compute prompts and engines that decode them, each a host and a port.

    Attributes:
        listens: where this engine computes prompts for others. None: it does not.
        peers: engines that compute prompts for this one.
    """

    listens: tuple[str, int] | None = None
    peers: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorAddress:
    """Where the agent finds the engine: a Unix socket of this user, or ``host:port`` of the loopback."""

    socket: Path | None = None
    tcp: str = ""

    def __str__(self) -> str:
        return f"unix:{self.socket}" if self.socket is not None else self.tcp
