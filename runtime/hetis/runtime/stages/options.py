"""What a stage process was asked to do; which stage it is, the engine says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetis.runtime.launch.room import Compute
from hetis.runtime.worker.settings import ProcessOptions, Setting, common_settings, read_settings

_SETTINGS = (
    *common_settings("STAGE", timeout_s=30),
    Setting(option="--model", variable="HETIS_STAGE_MODEL", metavar="DIR", meaning="folder of the model"),
    Setting(
        option="--device",
        variable="HETIS_STAGE_DEVICE",
        metavar="DEVICE",
        meaning="cuda (each rank on a GPU of its own), cpu; auto: cuda where there are as many GPUs",
        default="auto",
    ),
)
VARIABLES: Mapping[str, str] = {setting.option: setting.variable for setting in _SETTINGS}
_EXAMPLES = """examples:
  python -m hetis.runtime.stages --name s1 --store 127.0.0.1:8500 --model models/Llama-3.2-1B
  HETIS_STAGE_NAME=gpu2/0 HETIS_STORE=engine:8500 HETIS_STAGE_MODEL=/models/Llama-3.2-1B \\
      HETIS_STAGE_LISTEN=0.0.0.0:8600 HETIS_STAGE_ADVERTISE=10.0.0.2 python -m hetis.runtime.stages

exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions(ProcessOptions):
    """The settings of one stage process, each of them valid."""

    store: tuple[str, int]
    model: Path
    device: Compute


def read_options(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> StageOptions:
    """The settings that options and variables give together.

    Raises:
        OptionError: with all that is missing or wrong.
        SystemExit: an option that there is not, or ``--help``.
    """
    read = read_settings(
        _SETTINGS,
        arguments,
        environment,
        command="python -m hetis.runtime.stages",
        purpose="Be the stage that an engine says, until SIGTERM or SIGINT.",
        examples=_EXAMPLES,
    )
    listen = read.address("--listen", least_port=0)
    options = StageOptions(
        name=read.name("--name"),
        store=read.address("--store", least_port=1),
        model=Path(read.text("--model")),
        device=Compute(read.choice("--device", tuple(Compute))),
        listen=listen,
        advertise=read.advertised("--advertise", listen[0]),
        threads=read.threads("--threads"),
        timeout_s=read.seconds("--timeout"),
        log_level=read.level("--log-level"),
    )
    read.finish()
    return options
