"""What an attention worker was asked to do: by options or by variables of its environment, checked as a whole.

An option counts before its variable. The variables are for those who start processes without a shell: Kubernetes,
Slurm, systemd.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hetis.formats.units import parse_bytes
from hetis.solver.errors import HetisError

LEVELS = ("debug", "info", "warning", "error")
# Option, variable, what stands for it where neither is given (None: it must be given), its metavariable and meaning.
_SETTINGS = (
    ("--name", "HETIS_WORKER_NAME", None, "NAME", "unique among the workers of the store"),
    ("--store", "HETIS_STORE", None, "HOST:PORT", "the engine's rendezvous, to say there where this worker is"),
    ("--kv-memory", "HETIS_WORKER_KV_MEMORY", None, "SIZE", "for KV, such as 512MiB"),
    ("--listen", "HETIS_WORKER_LISTEN", "127.0.0.1:0", "HOST:PORT", "port 0: any free one; default: the loopback"),
    ("--advertise", "HETIS_WORKER_ADVERTISE", "", "HOST", "what the engine calls this host"),
    ("--device", "HETIS_WORKER_DEVICE", "cpu", "DEVICE", "cpu, cuda or cuda:N"),
    ("--threads", "HETIS_WORKER_THREADS", "1", "N", "of the CPU"),
    ("--timeout", "HETIS_WORKER_TIMEOUT", "10", "SECONDS", "for a frame that has begun"),
    ("--log-level", "HETIS_WORKER_LOG_LEVEL", "info", "LEVEL", ", ".join(LEVELS)),
)
VARIABLES: Mapping[str, str] = {option: variable for option, variable, *_ in _SETTINGS}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_EXAMPLES = """examples:
  python -m hetis.runtime.worker --name w1 --store 127.0.0.1:8500 --kv-memory 2GiB
  python -m hetis.runtime.worker --name gpu2/0 --store 10.0.0.1:8500 --kv-memory 20GiB --device cuda:0 \\
      --listen 10.0.0.2:0
  HETIS_WORKER_NAME=gpu2/0 HETIS_STORE=engine:8500 HETIS_WORKER_KV_MEMORY=20GiB HETIS_WORKER_DEVICE=cuda \\
      HETIS_WORKER_LISTEN=0.0.0.0:8600 HETIS_WORKER_ADVERTISE=10.0.0.2 python -m hetis.runtime.worker

exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables
"""


class OptionError(HetisError):
    """Options or variables are wrong; the messages are all that is."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """The settings of one worker, each of them valid. ``advertise`` is what the engine calls this host."""

    name: str
    store: tuple[str, int]
    kv_bytes: int
    listen: tuple[str, int]
    advertise: str
    device: str
    threads: int
    timeout_s: float
    log_level: str


def read_options(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> WorkerOptions:
    """The settings that options and variables give together.

    Raises:
        OptionError: with all that is missing or wrong.
        SystemExit: an option that there is not, or ``--help``.
    """
    given = vars(_parser().parse_args(arguments))
    read = _Reading()
    for option, variable, default, _, _ in _SETTINGS:
        said, named = given[option.removeprefix("--").replace("-", "_")], environment.get(variable)
        if said is not None:
            read.take(option, option, said)
        elif named:
            read.take(option, variable, named)
        elif default is not None:
            read.take(option, option, default)
        else:
            read.wrong.append(f"{option} is missing, and so is {variable}")
    listen = read.address("--listen", least_port=0)
    options = WorkerOptions(
        name=read.name("--name"),
        store=read.address("--store", least_port=1),
        kv_bytes=read.size("--kv-memory"),
        listen=listen,
        advertise=read.advertised("--advertise", listen[0]),
        device=read.device("--device"),
        threads=read.threads("--threads"),
        timeout_s=read.seconds("--timeout"),
        log_level=read.level("--log-level"),
    )
    if read.wrong:
        raise OptionError(*read.wrong)
    return options


@dataclass(slots=True)
class _Reading:
    """Texts of options with where each is from. What is wrong is noted, and something harmless returned for it."""

    texts: dict[str, tuple[str, str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def take(self, option: str, source: str, text: str) -> None:
        self.texts[option] = source, text

    def name(self, option: str) -> str:
        return self._matching(option, _NAME, "must be 1 to 128 letters, digits and ._:/-")

    def device(self, option: str) -> str:
        return self._matching(option, re.compile(r"cpu|cuda(:\d{1,3})?"), "must be cpu, cuda or cuda:N")

    def level(self, option: str) -> str:
        return self._matching(option, re.compile("|".join(LEVELS)), f"must be {', '.join(LEVELS)}").upper()

    def address(self, option: str, *, least_port: int) -> tuple[str, int]:
        source, text = self._of(option)
        host, _, port = text.rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdecimal() or not least_port <= int(port) <= 65_535:
            self._note(source, f"is {text!r}, must be HOST:PORT with a port >= {least_port} and <= 65535")
            return "127.0.0.1", 1
        return host, int(port)

    def advertised(self, option: str, listens: str) -> str:
        source, text = self._of(option)
        if not text and _is_any(listens):
            self._note(source, f"is missing: {listens} is every address of this host, which is the engine to use?")
        if text and _is_any(text):
            self._note(source, f"is {text}, must be one address of this host")
        return text or listens

    def size(self, option: str) -> int:
        source, text = self._of(option)
        if not source:
            return 1
        try:
            size = parse_bytes(text)
        except ValueError as error:
            self._note(source, f": {error}")
            return 1
        if size < 1:
            self._note(source, f"is {text}, must be > 0")
        return size

    def threads(self, option: str) -> int:
        source, text = self._of(option)
        if not text.isdecimal() or not 1 <= int(text) <= 1024:
            self._note(source, f"is {text!r}, must be a whole number >= 1 and <= 1024")
            return 1
        return int(text)

    def seconds(self, option: str) -> float:
        source, text = self._of(option)
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0.1 <= value <= 10**6:  # neither is what is not a number
            self._note(source, f"is {text!r}, must be seconds >= 0.1 and <= 1000000")
        return value

    def _matching(self, option: str, pattern: re.Pattern[str], wanted: str) -> str:
        source, text = self._of(option)
        if not pattern.fullmatch(text):
            self._note(source, f"is {text!r}, {wanted}")
        return text

    def _of(self, option: str) -> tuple[str, str]:
        return self.texts.get(option, ("", ""))

    def _note(self, source: str, what: str) -> None:
        if source:  # what is missing was noted when it was looked for
            self.wrong.append(f"{source}{what}" if what.startswith(":") else f"{source} {what}")


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hetis.runtime.worker",
        description="Hold KV of some attention heads and compute attention over it, until SIGTERM or SIGINT.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option, variable, default, metavar, meaning in _SETTINGS:
        also = f"[{variable}]" if not default else f"[{variable}; {default}]"
        parser.add_argument(option, metavar=metavar, help=f"{meaning} {also}")
    return parser
