"""KV of prompts under way, which the primary keeps beside its pages: counted before a prompt begins, and bounded."""

from __future__ import annotations


class PromptBook:
    """Positions of prompts that one stage's primary keeps in memory.

    A prompt is counted whole when its first chunk is planned, and until its last one is through: so one that has begun
    can always go on. One that finds no room waits, and nobody who comes later begins before it.

    Attributes:
        most_tokens: positions at a time. At least those of the longest prompt, or that would never begin.
    """

    def __init__(self) -> None:
        self.most_tokens = 0
        self._kept: dict[int, int] = {}
        self._next: int | None = None

    @property
    def tokens(self) -> int:
        """Positions that are counted now."""
        return sum(self._kept.values())

    def holds(self, request: int) -> bool:
        """Whether the prompt of a request has begun."""
        return request in self._kept

    def begin(self, request: int, tokens: int) -> bool:
        """Counts a prompt of so many ``tokens``; False: it has to wait."""
        if self._next not in {None, request} or self.tokens + tokens > self.most_tokens:
            self._next = request if self._next is None else self._next
            return False
        self._next = None
        self._kept[request] = tokens
        return True

    def end(self, request: int) -> None:
        """The prompt is through, or begins anew; one that is not counted is no error."""
        self._kept.pop(request, None)
        if self._next == request:
            self._next = None
