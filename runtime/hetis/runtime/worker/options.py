"""What an attention worker was asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetis.runtime.worker.settings import OptionError, ProcessOptions, Setting, common_settings, read_settings

__all__ = ["VARIABLES", "OptionError", "WorkerOptions", "read_options"]

_SETTINGS = (
    *common_settings("WORKER", timeout_s=10),
    Setting(option="--kv-memory", variable="HETIS_WORKER_KV_MEMORY", metavar="SIZE", meaning="for KV, such as 512MiB"),
    Setting(
        option="--device",
        variable="HETIS_WORKER_DEVICE",
        metavar="DEVICE",
        meaning="cpu, cuda or cuda:N",
        default="cpu",
    ),
)
VARIABLES: Mapping[str, str] = {setting.option: setting.variable for setting in _SETTINGS}
_EXAMPLES = """examples:
  python -m hetis.runtime.worker --name w1 --store 127.0.0.1:8500 --kv-memory 2GiB
  python -m hetis.runtime.worker --name gpu2/0 --store 10.0.0.1:8500 --kv-memory 20GiB --device cuda:0 \\
      --listen 10.0.0.2:0
  HETIS_WORKER_NAME=gpu2/0 HETIS_STORE=engine:8500 HETIS_WORKER_KV_MEMORY=20GiB HETIS_WORKER_DEVICE=cuda \\
      HETIS_WORKER_LISTEN=0.0.0.0:8600 HETIS_WORKER_ADVERTISE=10.0.0.2 python -m hetis.runtime.worker

exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions(ProcessOptions):
    """The settings of one worker, each of them valid."""

    kv_bytes: int
    device: str


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
        command="python -m hetis.runtime.worker",
        purpose="Hold KV of some attention heads and compute attention over it, until SIGTERM or SIGINT.",
        examples=_EXAMPLES,
    )
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
    read.finish()
    return options
