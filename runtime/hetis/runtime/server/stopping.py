"""Stop texts in a text that is still coming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Stopped(NamedTuple):
    """Text that may be told, and whether it ends here."""

    text: str
    is_over: bool


class StopTexts:
    """Ends a text before the first of its stop texts, wherever pieces meet."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # may be the beginning of a stop text

    def add(self, text: str) -> Stopped:
        """What can be told of everything so far. Where two stop texts end, the one that begins first counts."""
        if not self._stops:
            return Stopped(text, False)
        whole = self._held + text
        found = [begin for stop in self._stops if (begin := whole.find(stop)) >= 0]
        if found:
            self._held = ""
            return Stopped(whole[: min(found)], True)
        keep = max(_overlap(whole, stop) for stop in self._stops)
        self._held = whole[len(whole) - keep :]
        return Stopped(whole[: len(whole) - keep], False)

    def end(self) -> str:
        """What was held: no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with; fewer than ``stop`` has."""
    return next(size for size in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:size]))
