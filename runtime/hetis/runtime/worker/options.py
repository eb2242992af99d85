"""What an attention worker was asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetis.runtime.transport import keys
from hetis.runtime.worker.settings import OptionError, ProcessOptions, Setting, common_settings, read_settings

__all__ = ["VARIABLES", "OptionError", "WorkerOptions", "read_options"]

_SETTINGS = (
    *common_settings("WORKER", timeout_s=10, needs_store=False),
    Setting(option="--kv-memory", variable="HETIS_WORKER_KV_MEMORY", metavar="SIZE", meaning="for KV, such as 512MiB"),
    Setting(
        option="--device",
        variable="HETIS_WORKER_DEVICE",
        metavar="DEVICE",
        meaning="cpu, cuda or cuda:N",
        default="cpu",
    ),
    Setting(
        option="--key-file",
        variable="HETIS_WORKER_KEY_FILE",
        metavar="FILE",
        meaning=f"the key that engines must know, mode 0600; or the key itself in {keys.VARIABLE}",
        default="",
    ),
    Setting(
        option="--port-file",
        variable="HETIS_WORKER_PORT_FILE",
        metavar="FILE",
        meaning="to write HOST:PORT to, once engines may come",
        default="",
    ),
)
VARIABLES: Mapping[str, str] = {setting.option: setting.variable for setting in _SETTINGS}
_EXAMPLES = """examples:
  hetis-worker --name w1 --listen 127.0.0.1:7070 --kv-memory 2GiB --key-file /etc/hetis/worker.key
  hetis-worker --name gpu2/0 --listen 10.0.0.2:7070 --kv-memory 20GiB --device cuda:0 --key-file worker.key
  HETIS_WORKER_NAME=gpu2/0 HETIS_WORKER_KV_MEMORY=20GiB HETIS_WORKER_DEVICE=cuda HETIS_WORKER_LISTEN=10.0.0.2:7070 \\
      HETIS_WORKER_KEY=... hetis-worker
  hetis-worker --name w1 --store 127.0.0.1:8500 --kv-memory 2GiB      (hetis-serve finds it by its store)

exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions(ProcessOptions):
    """The settings of one worker, each of them valid.

    Attributes:
        key: that engines must say; None: one of its own, which the store tells them.
        port_file: where HOST:PORT is written.
    """

    kv_bytes: int
    device: str
    key: bytes | None
    port_file: Path | None


def read_options(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> WorkerOptions:
    """The settings that options and variables give together.

    Raises:
        OptionError: with all that is missing or wrong.
        SystemExit: an option that there is not, or ``--help``.
    """
    read = read_settings(
        _SETTINGS,
        arguments,
        environment,
        command="hetis-worker",
        purpose="Hold KV of some attention heads and compute attention over it, until SIGTERM or SIGINT.",
        examples=_EXAMPLES,
    )
    listen = read.address("--listen", least_port=0)
    store = read.address("--store", least_port=1) if read.text("--store") else None
    key = None
    try:
        key = keys.read_key(read.path("--key-file"), environment)
        if key is None and store is None:
            read.wrong.append(f"--key-file is missing, and so are {keys.VARIABLE} and --store")
    except keys.InvalidKeyError as error:
        read.wrong.append(str(error))
    options = WorkerOptions(
        name=read.name("--name"),
        store=store,
        kv_bytes=read.size("--kv-memory"),
        listen=listen,
        advertise=read.advertised("--advertise", listen[0]) if store else read.text("--advertise") or listen[0],
        device=read.device("--device"),
        threads=read.threads("--threads"),
        timeout_s=read.seconds("--timeout"),
        log_level=read.level("--log-level"),
        key=key,
        port_file=read.path("--port-file"),
    )
    read.finish()
    return options
