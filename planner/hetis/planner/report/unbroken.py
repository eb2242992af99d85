"""Names side by side, in lines that break between names and not inside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text


class Unbroken:
    """Parts with a separator after each but the last. Lines break only after separators as long as parts fit."""

    def __init__(self, parts: Sequence[Text], separator: str) -> None:
        last = len(parts) - 1
        self._parts = [part + separator if number < last else part for number, part in enumerate(parts)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._lines(options.max_width)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widths = [_width(part) for part in self._parts]
        most = sum(part.cell_len for part in self._parts)
        return Measurement(max(widths, default=0), most).with_maximum(options.max_width)

    def _lines(self, width: int) -> Iterator[Text]:
        line = Text(overflow="fold")
        for part in self._parts:
            if line and line.cell_len + _width(part) > width:
                line.rstrip()
                yield line
                line = Text(overflow="fold")
            line.append_text(part)
        yield line


def _width(part: Text) -> int:
    return len(part.plain.rstrip())
