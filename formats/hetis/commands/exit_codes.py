"""Exit codes with their meanings."""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class ExitCodes(IntEnum):
    """The base of a command's exit codes, which are written ``NAME = number, meaning``."""

    _value_: int
    meaning: str  # in one line; the part before the comma is the short form

    def __new__(cls, number: int, meaning: str) -> Self:
        code = int.__new__(cls, number)
        code._value_, code.meaning = number, meaning
        return code

    @classmethod
    def listed(cls) -> str:
        """Return all of them in short, for a command's help."""
        return "Exit codes: " + " · ".join(f"{code.value} {code.meaning.partition(',')[0]}" for code in cls)
