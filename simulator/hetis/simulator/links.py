"""Links that transfers in the background share: one after the other, as fast as the slower end allows."""

from __future__ import annotations


class SharedLink:
    """One end of transfers: a network card, or the link between two zones. Transfers come first, go first."""

    __slots__ = ("busy_s", "free_s")

    def __init__(self) -> None:
        self.free_s = self.busy_s = 0.0


def transfer(now_s: float, seconds: float, *ends: SharedLink) -> float:
    """Occupies all ``ends`` for ``seconds`` as soon as all are free; returns when it is done."""
    start_s = max(now_s, *(end.free_s for end in ends))
    for end in ends:
        end.free_s = start_s + seconds
        end.busy_s += seconds
    return start_s + seconds
