"""The process of an attention worker, and its settings from options or environment variables, checked as a whole.

An option takes precedence over its variable. The variables serve those who start processes without a shell:
Kubernetes, Slurm, systemd. Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from hetis.formats.endpoints import split_address
from hetis.formats.units import parse_bytes
from hetis.runtime.transport import keys
from hetis.solver.errors import HetisError

if TYPE_CHECKING:
    from hetis.runtime.worker.core import WorkerCore


LEVELS = ("debug", "info", "warning", "error")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
_LEVEL = re.compile("|".join(LEVELS))
_EXAMPLES = """examples:
  hetis-worker --name w1 --listen 127.0.0.1:7070 --kv-memory 2GiB --key-file /etc/hetis/worker.key
  hetis-worker --name gpu2/0 --listen 10.0.0.2:7070 --kv-memory 20GiB --device cuda:0 --key-file worker.key
  HETIS_WORKER_NAME=gpu2/0 HETIS_WORKER_KV_MEMORY=20GiB HETIS_WORKER_DEVICE=cuda HETIS_WORKER_LISTEN=10.0.0.2:7070 \\
      HETIS_WORKER_KEY=... hetis-worker

exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables
"""


class WorkerOptionError(HetisError):
    """Options or variables are wrong. There is one message for each problem."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetting:
    """One setting. It is required if ``default`` is None."""

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


def _setting(option: str, metavar: str, meaning: str, default: str | None = None) -> WorkerSetting:
    variable = "HETIS_WORKER_" + option.removeprefix("--").replace("-", "_").upper()
    return WorkerSetting(option=option, variable=variable, metavar=metavar, meaning=meaning, default=default)


_SETTINGS = (
    _setting("--name", "NAME", "what its engine calls it"),
    _setting("--listen", "HOST:PORT", "port 0: any free one", "127.0.0.1:0"),
    _setting("--threads", "N", "of the CPU", "1"),
    _setting("--timeout", "SECONDS", "for a frame that has begun", "10"),
    _setting("--log-level", "LEVEL", ", ".join(LEVELS), "info"),
    _setting("--kv-memory", "SIZE", "for KV, such as 512MiB"),
    _setting("--device", "DEVICE", "cpu, cuda or cuda:N", "cpu"),
    _setting(
        "--key-file", "FILE", f"the key that engines must know, mode 0600; or the key itself in {keys.VARIABLE}", ""
    ),
    _setting("--port-file", "FILE", "to write HOST:PORT to, once engines may come", ""),
)
VARIABLES: Mapping[str, str] = {setting.option: setting.variable for setting in _SETTINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """The settings of one worker, each of them valid.

    Attributes:
        key: that engines must present.
        port_file: where HOST:PORT is written.
    """

    name: str
    listen: tuple[str, int]
    kv_bytes: int
    device: str
    threads: int
    timeout_s: float
    log_level: str
    key: bytes
    port_file: Path | None


def make_parser() -> argparse.ArgumentParser:
    """Return the command line of `hetis-worker`. `read_options` checks the values."""
    parser = argparse.ArgumentParser(
        prog="hetis-worker",
        description="Hold KV of some attention heads and compute attention over it, until SIGTERM or SIGINT.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for setting in _SETTINGS:
        parser.add_argument(setting.option, dest=setting.option, metavar=setting.metavar, help=setting.help)
    return parser


def read_options(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> WorkerOptions:
    """Return the settings that options and variables give together.

    Raises:
        WorkerOptionError: with everything that is missing or wrong.
        SystemExit: an unknown option, or ``--help``.
    """
    parser = make_parser()
    read = _Reading(_SETTINGS, vars(parser.parse_args(arguments)), environment)
    options = WorkerOptions(
        name=read.name("--name"),
        listen=read.address("--listen", least_port=0),
        kv_bytes=read.size("--kv-memory"),
        device=read.device("--device"),
        threads=read.threads("--threads"),
        timeout_s=read.seconds("--timeout"),
        log_level=read.level("--log-level"),
        key=read.key("--key-file", environment),
        port_file=read.path("--port-file"),
    )
    read.finish()
    return options


class _Reading:
    """The settings of one start. Problems are collected, and something harmless is returned in place of a bad value.

    Attributes:
        wrong: all problems.
    """

    def __init__(
        self, settings: Sequence[WorkerSetting], given: Mapping[str, str | None], environment: Mapping[str, str]
    ) -> None:
        """Initialise with the value of each option, None if it was not given."""
        self.wrong: list[str] = []
        self._texts: dict[str, tuple[str, str]] = {}  # option -> (source, text)
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
        """Raise WorkerOptionError with everything that was missing or wrong."""
        if self.wrong:
            raise WorkerOptionError(*self.wrong)

    def text(self, option: str) -> str:
        return self._of(option)[1]

    def path(self, option: str) -> Path | None:
        text = self.text(option)
        return Path(text) if text else None

    def key(self, option: str, environment: Mapping[str, str]) -> bytes:
        try:
            key = keys.read_key(self.path(option), environment)
        except keys.InvalidKeyError as error:
            self.wrong.append(str(error))
            return b""
        if key is None:
            self.wrong.append(f"{option} is missing, and so is {keys.VARIABLE}")
        return key or b""

    def name(self, option: str) -> str:
        return self._matching(option, _NAME, "must be 1 to 128 letters, digits and ._:/-")

    def device(self, option: str) -> str:
        return self._matching(option, _DEVICE, "must be cpu, cuda or cuda:N")

    def level(self, option: str) -> str:
        return self._matching(option, _LEVEL, f"must be {', '.join(LEVELS)}").upper()

    def address(self, option: str, *, least_port: int) -> tuple[str, int]:
        source, text = self._of(option)
        try:
            return split_address(text, least_port=least_port)
        except ValueError:
            self._note(source, f" is {text!r}, must be HOST:PORT with a port >= {least_port} and <= 65535")
            return "127.0.0.1", 1

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
        if not 0.1 <= value <= 10**6:  # this also catches NaN
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
        if source:  # missing values were noted at the start
            self.wrong.append(source + what)


EXIT_FAILED, EXIT_INVALID = 1, 2


class StartError(HetisError):
    """The process cannot run as its options say. The message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve engines until SIGTERM or SIGINT, and return the exit code."""
    try:
        options = read_options(arguments, os.environ)
    except WorkerOptionError as error:
        for message in error.messages:
            print(f"hetis worker: {message}", file=sys.stderr)
        return EXIT_INVALID
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    return _serve(options)


def _serve(options: WorkerOptions) -> int:
    import torch

    from hetis.runtime.transport.pipes import listen
    from hetis.runtime.worker.loop import WorkerLoop

    torch.set_num_threads(options.threads)
    host, port = options.listen
    try:
        core = _make_core(options)
        listener = listen(host, port)
    except StartError as error:
        return _failed(options, str(error), EXIT_INVALID)
    except OSError as error:
        return _failed(options, f"cannot listen on {host}:{port}: {error.strerror or error}", EXIT_FAILED)
    port = listener.getsockname()[1]
    logging.info("%s: listens on %s:%d", options.name, host, port)
    loop = WorkerLoop(core, listener, stall_s=options.timeout_s)
    try:
        if options.port_file is not None:
            _write_whole(options.port_file, f"[{host}]:{port}\n" if ":" in host else f"{host}:{port}\n")
    except OSError as error:
        return _failed(options, f"{options.port_file}: {error.strerror or error}", EXIT_FAILED)
    try:
        with torch.inference_mode():  # once, not for every frame
            loop.run()
    finally:
        if options.port_file is not None:
            options.port_file.unlink(missing_ok=True)
    return 0


def _make_core(options: WorkerOptions) -> WorkerCore:
    """Return the core to serve with. Raises StartError."""
    from hetis.formats.units import format_bytes
    from hetis.runtime.attention.device import LocalDevice
    from hetis.runtime.attention.kv import KvShape, cuda_count, free_memory_bytes
    from hetis.runtime.worker.core import WorkerCore

    name, device = options.name, options.device

    def make_device(shape: KvShape) -> LocalDevice:
        made = LocalDevice(name, shape, options.kv_bytes // shape.page_bytes, device=device)
        made.warm()
        return made

    if device != "cpu" and int(device.partition(":")[2] or 0) >= cuda_count():
        raise StartError(f"{device} is not there: torch finds {cuda_count()} CUDA devices")
    # Check now, not when pages are first written: the system would then kill the process.
    if options.kv_bytes > (free := free_memory_bytes(device)):
        raise StartError(f"--kv-memory is {format_bytes(options.kv_bytes)}, {device} has {free >> 20}MiB free")
    if device == "cpu" and find_spec("numba"):
        _compile_for_cpu()
    return WorkerCore(name, make_device, key=options.key)


def _compile_for_cpu() -> None:
    """Compile the kernels before engines may connect, once per machine: it can take a minute."""
    from hetis.runtime.attention import paged_compiled
    from hetis.runtime.attention.device import LocalDevice
    from hetis.runtime.attention.kv import KvShape
    from hetis.solver.compiled import is_cached

    kernels: dict[str, Callable[..., None]] = {
        "float32": paged_compiled.attend,
        "bfloat16": paged_compiled.attend_bfloat16,
    }
    for dtype, kernel in kernels.items():
        if not is_cached(kernel):
            sizes = {"layers": 1, "head_dim": 16, "queries_per_group": 1, "page_tokens": 16}
            LocalDevice("none", KvShape(**sizes, dtype=dtype, scale=1.0, windows=(0,)), 1).warm()


def _failed(options: WorkerOptions, why: str, code: int) -> int:
    print(f"hetis worker {options.name}: {why}", file=sys.stderr)
    return code


def _write_whole(path: Path, text: str) -> None:
    """Write a file atomically. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
