"""Controls that a person changes while a simulated engine runs, in one small YAML or JSON file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_log = logging.getLogger(__name__)


class ControlError(ValueError):
    """A control file cannot be used. The message names file, field and value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """The load on every replica whose primary is here, and the faults to simulate.

    Attributes:
        rate_rps: arrivals per second and replica. None: ``load_ratio`` times the rate that the plan promises.
        load_ratio: see ``rate_rps``.
        prompt_tokens: mean length of a prompt; lengths are exponential.
        output_tokens: mean length of an output.
        slow: factor by which attention takes longer than the profile says, by device ``node/index``.
        pause: stop decoding.
        load_s: seconds to load the weights.
        dense_step_s: seconds of a step outside attention. None: half the time per token that the plan promises.
        fail_copies: CopyMoves fails with COPY_FAILED.
    """

    rate_rps: float | None = None
    load_ratio: float = 0.0
    prompt_tokens: float = 512.0
    output_tokens: float = 128.0
    slow: Mapping[str, float] = field(default_factory=dict)
    pause: bool = False
    load_s: float = 0.2
    dense_step_s: float | None = None
    fail_copies: bool = False

    @classmethod
    def of(cls, data: Any, *, source: str) -> Control:
        """Read the controls from plain data.

        Raises:
            ControlError: a field is unknown or out of range.
        """
        fields = {entry.name for entry in dataclasses.fields(cls)}
        if data is None:
            return cls()
        if not isinstance(data, dict) or not fields.issuperset(data):
            unknown = sorted(set(data) - fields, key=str) if isinstance(data, dict) else [data]
            raise ControlError(f"{source}: {unknown} is not known here; fields are {', '.join(sorted(fields))}")
        for name, value in data.items():
            _check(name, value, source)
        return cls(**data)


class ControlFile:
    """A control file that is read again when it changes. A file that cannot be used changes nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self.control = Control()

    def look(self) -> bool:
        """Return whether the control has changed. A missing file counts as empty."""
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size)
        except OSError:
            seen = None
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            text = self._path.read_text(encoding="utf-8") if seen else ""
            control = Control.of(yaml.safe_load(text), source=str(self._path))
        except (OSError, ValueError, yaml.YAMLError) as error:
            _log.error("control file is not used: %s", error)
            return False
        changed, self.control = control != self.control, control
        return changed


def _check(name: str, value: Any, source: str) -> None:
    def refuse(expected: str) -> ControlError:
        return ControlError(f"{source}: {name} is {value!r}, must be {expected}")

    if name in ("pause", "fail_copies"):
        if not isinstance(value, bool):
            raise refuse("true or false")
    elif name == "slow":
        if not isinstance(value, dict) or not all(_is_number(factor) and factor > 0 for factor in value.values()):
            raise refuse("a mapping of devices to factors above 0")
    elif value is None and name in ("rate_rps", "dense_step_s"):
        return
    elif not _is_number(value) or value < (1 if name.endswith("_tokens") else 0):
        raise refuse("a number of at least 1" if name.endswith("_tokens") else "a number of at least 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")
