"""Settings of a process that serves an engine: options or variables of its environment, checked as a whole.

An option counts before its variable. The variables are for those who start processes without a shell: Kubernetes,
Slurm, systemd.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetis.formats.units import parse_bytes
from hetis.solver.errors import HetisError

LEVELS = ("debug", "info", "warning", "error")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
_LEVEL = re.compile("|".join(LEVELS))


class OptionError(HetisError):
    """Options or variables are wrong; the messages are all that is."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting; ``default`` None: it must be given."""

    option: str
    variable: str
    metavar: str
    meaning: str
    default: str | None = None

    @property
    def help(self) -> str:
        return (
            f"{self.meaning} [{self.variable}; {self.default}]" if self.default else f"{self.meaning} [{self.variable}]"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions:
    """What `common_settings` say, each of them valid.

    Attributes:
        store: where the process says where it is; None: nowhere.
        advertise: what the engine calls this host.
    """

    name: str
    store: tuple[str, int] | None
    listen: tuple[str, int]
    advertise: str
    threads: int
    timeout_s: float
    log_level: str


def common_settings(who: str, *, timeout_s: float, needs_store: bool = True) -> tuple[Setting, ...]:
    """What a process is told that serves an engine; ``who`` is in the names of its variables: ``WORKER``."""
    rows = (
        ("--name", f"HETIS_{who}_NAME", "NAME", "unique among the processes of the store", None),
        (
            "--store",
            "HETIS_STORE",
            "HOST:PORT",
            "the engine's rendezvous, to say there where this process is",
            None if needs_store else "",
        ),
        ("--listen", f"HETIS_{who}_LISTEN", "HOST:PORT", "port 0: any free one", "127.0.0.1:0"),
        ("--advertise", f"HETIS_{who}_ADVERTISE", "HOST", "what the engine calls this host", ""),
        ("--threads", f"HETIS_{who}_THREADS", "N", "of the CPU", "1"),
        ("--timeout", f"HETIS_{who}_TIMEOUT", "SECONDS", "for a frame that has begun", f"{timeout_s:g}"),
        ("--log-level", f"HETIS_{who}_LOG_LEVEL", "LEVEL", ", ".join(LEVELS), "info"),
    )
    return tuple(
        Setting(option=option, variable=variable, metavar=metavar, meaning=meaning, default=default)
        for option, variable, metavar, meaning, default in rows
    )


class Reading:
    """The settings of one start. What is wrong is noted, and something harmless returned in its place.

    Attributes:
        wrong: all that is.
    """

    def __init__(
        self, settings: Sequence[Setting], given: Mapping[str, str | None], environment: Mapping[str, str]
    ) -> None:
        """``given``: by option, None where it was not."""
        self.wrong: list[str] = []
        self._texts: dict[str, tuple[str, str]] = {}  # by option: who says so, and what
        for setting in settings:
            said, named = given[setting.option], environment.get(setting.variable)
            if said is not None:
                self._texts[setting.option] = setting.option, said
            elif named:
                self._texts[setting.option] = setting.variable, named
            elif setting.default is not None:
                self._texts[setting.option] = setting.option, setting.default
            else:
                self.wrong.append(f"{setting.option} is missing, and so is {setting.variable}")

    def finish(self) -> None:
        """Raises OptionError: with all that was missing or wrong."""
        if self.wrong:
            raise OptionError(*self.wrong)

    def text(self, option: str) -> str:
        return self._of(option)[1]

    def path(self, option: str) -> Path | None:
        text = self.text(option)
        return Path(text) if text else None

    def name(self, option: str) -> str:
        return self._matching(option, _NAME, "must be 1 to 128 letters, digits and ._:/-")

    def device(self, option: str) -> str:
        return self._matching(option, _DEVICE, "must be cpu, cuda or cuda:N")

    def choice(self, option: str, choices: Sequence[str]) -> str:
        source, text = self._of(option)
        if text in choices:
            return text
        self._note(source, f" is {text!r}, must be {', '.join(choices)}")
        return choices[0]

    def level(self, option: str) -> str:
        return self._matching(option, _LEVEL, f"must be {', '.join(LEVELS)}").upper()

    def address(self, option: str, *, least_port: int) -> tuple[str, int]:
        source, text = self._of(option)
        host, _, port = text.rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdecimal() or not least_port <= int(port) <= 65_535:
            self._note(source, f" is {text!r}, must be HOST:PORT with a port >= {least_port} and <= 65535")
            return "127.0.0.1", 1
        return host, int(port)

    def advertised(self, option: str, listens: str) -> str:
        """What the engine calls this host, which listens at ``listens``."""
        source, text = self._of(option)
        if not text and _is_any(listens):
            self._note(source, f" is missing: {listens} is every address of this host, which is the engine to use?")
        if text and _is_any(text):
            self._note(source, f" is {text}, must be one address of this host")
        return text or listens

    def size(self, option: str) -> int:
        source, text = self._of(option)
        try:
            size = parse_bytes(text)
        except ValueError as error:
            self._note(source, f": {error}")
            return 1
        if size < 1:
            self._note(source, f" is {text}, must be > 0")
        return size

    def threads(self, option: str) -> int:
        source, text = self._of(option)
        if not text.isdecimal() or not 1 <= int(text) <= 1024:
            self._note(source, f" is {text!r}, must be a whole number >= 1 and <= 1024")
            return 1
        return int(text)

    def seconds(self, option: str) -> float:
        source, text = self._of(option)
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0.1 <= value <= 10**6:  # neither is what is not a number
            self._note(source, f" is {text!r}, must be seconds >= 0.1 and <= 1000000")
        return value

    def _matching(self, option: str, pattern: re.Pattern[str], wanted: str) -> str:
        source, text = self._of(option)
        if not pattern.fullmatch(text):
            self._note(source, f" is {text!r}, {wanted}")
        return text

    def _of(self, option: str) -> tuple[str, str]:
        return self._texts.get(option, ("", ""))

    def _note(self, source: str, what: str) -> None:
        if source:  # what is missing was noted at the start
            self.wrong.append(source + what)


def read_settings(
    settings: Sequence[Setting],
    arguments: Sequence[str] | None,
    environment: Mapping[str, str],
    *,
    command: str,
    purpose: str,
    examples: str,
) -> Reading:
    """What options and variables say together; ``--help`` shows the command, what it is for, and ``examples``.

    Raises:
        SystemExit: an option that there is not, or ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog=command,
        description=purpose,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for setting in settings:
        parser.add_argument(setting.option, dest=setting.option, metavar=setting.metavar, help=setting.help)
    return Reading(settings, vars(parser.parse_args(arguments)), environment)


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
