"""What `hetis-serve` was asked to do, checked as a whole before anything is loaded."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from hetis.formats.units import parse_bytes
from hetis.runtime.launch.room import Compute, DeviceRoom
from hetis.runtime.model.config import DTYPES
from hetis.runtime.server.asked import ExecutorAddress, PromptAddresses, RedispatchMode
from hetis.runtime.server.errors import ServeError

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_DEVICE = re.compile(r"(?P<device>cpu(?=:)|cuda:(?:0|[1-9]\d{0,2}))(?::(?P<size>.+))?")
KEY_VARIABLE = "HETIS_API_KEY"
LEAST_KEY = 16  # characters
_SEND_BYTES = 128 * 2**10
_LONGEST_SOCKET = 107  # bytes, of sun_path on Linux


class Checking:
    """Checks one option after the other, so that everything that is wrong is said at once."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def get(self, check: Callable[[], T]) -> T | None:
        """What the check returns; None where it says that something is wrong."""
        try:
            return check()
        except ServeError as error:
            self.wrong += error.messages
            return None

    def finish(self) -> None:
        """Ends the checks.

        Raises:
            ServeError: with all that was wrong.
        """
        if self.wrong:
            raise ServeError(*self.wrong)


def checked_folder(folder: Path | None) -> Path:
    """The model's folder.

    Raises:
        ServeError: it is missing, or is none.
    """
    if folder is None:
        raise ServeError("--model is missing: the folder of a model (config.json, safetensors, tokenizer)")
    if not folder.is_dir():
        raise ServeError(f"--model {folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise ServeError(f"--model {folder}: there is no config.json in it")
    return folder


def checked_devices(texts: list[str]) -> tuple[DeviceRoom, ...]:
    """``cpu:2GiB``, ``cuda:0:20GiB`` or ``cuda:0``, each perhaps after ``NAME=``; the first is the primary.

    Raises:
        ServeError: one is something else, or two have one name.
    """
    wrong, rooms = [], []
    for number, text in enumerate(texts):
        name, _, rest = text.rpartition("=")
        found = _DEVICE.fullmatch(rest)
        name = name or f"{rest.partition(':')[0]}{number}"
        if not found:
            wrong.append(f"--device is {text!r}, must be [NAME=]cpu:SIZE or [NAME=]cuda:N[:SIZE], such as cpu:2GiB")
        elif not _NAME.fullmatch(name):
            wrong.append(f"--device {text!r}: the name is {name!r}, must be of letters, digits and ._:/-")
        else:
            try:
                size = parse_bytes(found["size"]) if found["size"] else None
                rooms.append(DeviceRoom(name=name, kv_bytes=size, device=found["device"]))
            except ValueError as error:
                wrong.append(f"--device {text!r}: {error}")
    names = [room.name for room in rooms]
    wrong += [f"--device: two are named {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    if wrong:
        raise ServeError(*wrong)
    return tuple(rooms)


def checked_compute(text: str, *, has_devices: bool) -> Compute:
    """What devices compute on that no ``--device`` tells of.

    Raises:
        ServeError: it is nothing known, or the devices say it themselves.
    """
    if text not in list(Compute):
        raise ServeError(f"--compute is {text!r}, must be {', '.join(Compute)}")
    if has_devices and text != Compute.AUTO:
        raise ServeError("--compute and --device: a device says what it computes on; give one of the two")
    return Compute(text)


def checked_stages(texts: list[str], *, has_plan: bool) -> tuple[tuple[str, int], ...]:
    """``NAME=NUMBER``, processes and the stages they run.

    Raises:
        ServeError: one is something else, two run one stage, or there is no plan that has stages.
    """
    wrong = [] if has_plan or not texts else ["--stage is of a plan's, and needs --plan"]
    found = []
    for text in texts:
        name, _, number = text.rpartition("=")
        if not _NAME.fullmatch(name) or not number.isdecimal() or len(number) > 4:
            wrong.append(f"--stage is {text!r}, must be NAME=NUMBER such as s1=1")
        else:
            found.append((name, int(number)))
    numbers = [number for _, number in found]
    wrong += [f"--stage: stage {n} is run by two" for n in sorted(set(numbers)) if numbers.count(n) > 1]
    if wrong:
        raise ServeError(*wrong)
    return tuple(found)


def checked_workers(names: list[str], store: str, rooms: tuple[DeviceRoom, ...], *, stages: Sequence[str] = ()) -> None:
    """Names of workers and of ``stages``, and the store that they need.

    Raises:
        ServeError: one comes twice or is no name, or the store is missing, too much, or no address.
    """
    wrong = [
        f"--worker is {name!r}, must be of letters, digits and ._:/-" for name in names if not _NAME.fullmatch(name)
    ]
    every = [*names, *stages, *(room.name for room in rooms)]
    wrong += [f"--worker {name}: the name is taken" for name in sorted(set(names)) if every.count(name) > 1]
    wrong += [f"--stage {name}: the name is taken" for name in sorted({n for n in stages if stages.count(n) > 1})]
    host, _, port = store.rpartition(":")
    if (names or stages) and not store:
        option = "--worker" if names else "--stage"
        wrong.append(f"{option} needs --store HOST:PORT, where workers say where they are")
    elif store and not (names or stages):
        wrong.append("--store needs at least one --worker")
    elif store and not (host and port.isdigit() and 0 < int(port) < 65_536):
        wrong.append(f"--store is {store!r}, must be HOST:PORT such as 127.0.0.1:8500")
    if wrong:
        raise ServeError(*wrong)


def checked_executor(text: str) -> ExecutorAddress | None:
    """``unix:PATH`` or ``HOST:PORT``; None: nobody steers the engine.

    Raises:
        ServeError: it is neither, its folder is missing, or other machines could reach it: calls are not encrypted.
    """
    if not text:
        return None
    if text.startswith("unix:"):
        path = Path("/" + text[5:].lstrip("/") if text.startswith("unix:/") else text[5:])
        if not path.name or not path.parent.is_dir():
            raise ServeError(f"--executor {text}: there is no folder {path.parent}")
        if len(os.fsencode(path)) > _LONGEST_SOCKET:
            raise ServeError(
                f"--executor {text}: the path has {len(os.fsencode(path))} bytes, may have {_LONGEST_SOCKET}"
            )
        return ExecutorAddress(socket=path)
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ServeError(f"--executor is {text!r}, must be unix:PATH or HOST:PORT such as unix:/run/hetis/engine.sock")
    if not is_loopback(host.strip("[]")):
        raise ServeError(f"--executor {text} can be reached from other machines, must be of the loopback: 127.0.0.1")
    return ExecutorAddress(tcp=text)


def checked_prompts(listens: str, peers: Sequence[str], *, has_key: bool, insecure: bool) -> PromptAddresses:
    """``HOST:PORT`` where prompts are computed for others, empty for nowhere, and where others compute ours.

    Raises:
        ServeError: one is something else, or comes twice; others could connect without a key; or both are given: what
            an engine is asked to compute it would ask others for in turn.
    """
    wrong, own = [], None
    if listens and peers:
        wrong.append(
            "--kv-listen and --prefill are both given, may be one of them: an engine computes prompts for others, or "
            "has its own computed"
        )
    if listens:
        own = _address(listens)
        if own is None:
            wrong.append(f"--kv-listen is {listens!r}, must be HOST:PORT such as 127.0.0.1:8700")
        elif not is_loopback(own[0]) and not has_key and not insecure:
            wrong.append(
                f"--kv-listen {listens} can be reached from other machines: give --api-key-file or HETIS_API_KEY, or "
                "--insecure"
            )
    found = [_address(peer) for peer in peers]
    wrong += [
        f"--prefill is {text!r}, must be HOST:PORT such as 10.0.0.2:8700"
        for text, where in zip(peers, found, strict=True)
        if where is None
    ]
    wrong += [f"--prefill {text} comes twice" for text in sorted({text for text in peers if peers.count(text) > 1})]
    if wrong:
        raise ServeError(*wrong)
    return PromptAddresses(listens=own, peers=tuple(where for where in found if where is not None))


def _address(text: str) -> tuple[str, int] | None:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    return (host, int(port)) if host and port.isdecimal() and 0 < int(port) < 65_536 else None


def checked_redispatch(text: str, executor: str) -> RedispatchMode | None:
    """Who moves heads; None for ``auto``.

    Raises:
        ServeError: it is nobody known, or the planner without a way to ask.
    """
    if text == "auto":
        return None
    if text not in list(RedispatchMode):
        raise ServeError(f"--redispatch is {text!r}, must be auto, {', '.join(RedispatchMode)}")
    if text == RedispatchMode.PLANNER and not executor:
        raise ServeError("--redispatch planner needs --executor, where the agent asks for it")
    return RedispatchMode(text)


def checked_range(option: str, value: float, *, least: float, most: float) -> float:
    """Raises ServeError: the value is outside."""
    if not least <= value <= most:
        raise ServeError(f"{option} is {value:.12g}, must be >= {least:.12g} and <= {most:.12g}")
    return value


def checked_size(option: str, text: str) -> int:
    """Bytes, at least one. Raises ServeError: it is no size."""
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ServeError(f"{option}: {error}") from None
    if not size:
        raise ServeError(f"{option} is {text}, must be > 0")
    return size


def checked_dtype(dtype: str) -> str | None:
    """None for ``auto``: the checkpoint's own."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ServeError(f"--dtype is {dtype!r}, must be auto, {', '.join(DTYPES)}")
    return None if dtype == "auto" else dtype


def checked_name(name: str, folder: Path | None) -> str:
    """How clients call the model: by default as its folder is called."""
    name = name or (folder.resolve().name if folder is not None else "")
    if folder is not None and not _NAME.fullmatch(name):
        raise ServeError(f"--served-name is {name!r}, must be 1 to 128 letters, digits and ._:/-")
    return name


def api_key(path: Path | None) -> str | None:
    """The key that clients must say, from a file or from the environment; None: none is needed.

    Raises:
        ServeError: the file cannot be read, or the key is too short to be one.
    """
    key = os.environ.get(KEY_VARIABLE)
    where = KEY_VARIABLE
    if path is not None:
        where = f"--api-key-file {path}"
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ServeError(f"{where}: {reason}") from None
    if key is None:
        return None
    if len(key) < LEAST_KEY or not key.isprintable() or " " in key:
        raise ServeError(f"{where}: the key must have at least {LEAST_KEY} printable characters and no spaces")
    return key


def is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def bound_socket(host: str, port: int, *, write_s: float) -> socket.socket:
    """A listening address. A peer that takes nothing for ``write_s`` loses its connection by the kernel as well.

    Raises:
        ServeError: the address is taken, or not ours.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Not as much as the kernel would give: a reader that does not read is noticed, and holds little meanwhile.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(write_s * 1000))
        made.bind(where)
    except OSError as error:
        made.close()
        raise ServeError(f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}") from None
    return made
