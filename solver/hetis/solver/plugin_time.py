"""What an engine's own code for attention workers takes, beside the attention itself: seconds of hosts, by replica."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.solver.errors import InvalidProblemError


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginTime:
    """Seconds that attention workers add to the engine of their replica; other replicas are engines as they are.

    Attributes:
        local_s: per layer and iteration, wherever heads are: attention is a call of its own between captured graphs.
        exchange_s: per layer and iteration in which workers hold heads: to start the exchange, and to merge results.
        exchange_low_s, exchange_high_s: the measured range of that.
        step_s, sequence_s: per iteration and stage, and per sequence with logits: without asynchronous scheduling, an
            iteration waits for the scheduler, and for what becomes of each token of the one before.
        source: where it was measured.
    """

    local_s: float = 0.0
    exchange_s: float = 0.0
    exchange_low_s: float = 0.0
    exchange_high_s: float = 0.0
    step_s: float = 0.0
    sequence_s: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("local_s", "exchange_s", "exchange_low_s", "exchange_high_s", "step_s", "sequence_s"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise InvalidProblemError(f"plugin {name} is {value}, must be finite and >= 0")
        if not self.exchange_low_s <= self.exchange_s <= self.exchange_high_s:
            raise InvalidProblemError(
                f"plugin exchange_s is {self.exchange_s}, must be from {self.exchange_low_s} to {self.exchange_high_s}"
            )


NO_PLUGIN = PluginTime()
