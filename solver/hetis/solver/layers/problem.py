"""The layers problem: nodes measured by the number of layers they hold, the requests, and the links between nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hetis.solver.errors import InvalidProblemError

# The model of requests in flight; docs/layers.md derives both, and benchmarks/layers.py compares them with a queue.
OUTPUT_STRETCH = 2.0  # ratio of outputs in flight to the mean output, for exponential lengths
BATCH_SHARE = 0.5  # share of the requests that pass a node in one of its batches: they travel in two clumps
WAIT_SHARE = 0.5  # share of a batch of one sequence that a visit waits for the other clump

MAX_LAYERS = 1000
MAX_NODES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeTable:
    """Seconds of one layer for a batch, linear between measured ``sizes`` (tokens or sequences, ascending).

    Smaller batches take as long as the smallest measured one, and larger ones continue with the last slope.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.seconds):
            raise InvalidProblemError(f"{len(self.sizes)} sizes with {len(self.seconds)} times, need one or more pairs")
        if any(b <= a for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise InvalidProblemError(f"sizes {self.sizes} must ascend")
        if any(b < a for a, b in zip(self.seconds, self.seconds[1:], strict=False)):
            raise InvalidProblemError(f"times {self.seconds} must not fall as batches grow")
        if self.sizes[0] < 0 or self.seconds[0] < 0 or not math.isfinite(self.sizes[-1] + self.seconds[-1]):
            raise InvalidProblemError("sizes and times must be finite and >= 0")
        if self.seconds[-1] <= 0:
            raise InvalidProblemError("the largest batch takes no time")

    def at(self, size: float) -> float:
        """Return the seconds of a batch of ``size``."""
        if size <= self.sizes[0]:
            return self.seconds[0]
        last = len(self.sizes) - 1
        if last == 0:
            return self.seconds[0] * size / self.sizes[0] if self.sizes[0] > 0 else self.seconds[0]
        right = next((n for n, known in enumerate(self.sizes) if known >= size), last)
        left = right - 1
        slope = (self.seconds[right] - self.seconds[left]) / (self.sizes[right] - self.sizes[left])
        return self.seconds[left] + slope * (size - self.sizes[left])


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """Equal nodes. Entry k - 1 of a sequence is for a node with k layers; its length is the most it can hold.

    Attributes:
        tokens_per_s: tokens, of prompts and outputs alike, that the node can process with the layers it holds.
        kv_token_layers: KV entries that it has room for, one for each token and layer.
        prompt: seconds of one layer by prompt tokens; None: derived from `tokens_per_s`.
        decode: seconds of one layer by the number of decoding sequences; None: derived from `tokens_per_s`.
    """

    name: str
    count: int
    tokens_per_s: tuple[float, ...]
    kv_token_layers: tuple[float, ...]
    prompt: TimeTable | None = None
    decode: TimeTable | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidProblemError(f"{self.name}: count is {self.count}, must be >= 1")
        if not self.tokens_per_s or len(self.tokens_per_s) != len(self.kv_token_layers):
            raise InvalidProblemError(
                f"{self.name}: tokens_per_s has {len(self.tokens_per_s)} entries and kv_token_layers "
                f"{len(self.kv_token_layers)}, both need one for every number of layers held"
            )
        for name, values in (("tokens_per_s", self.tokens_per_s), ("kv_token_layers", self.kv_token_layers)):
            if any(not (math.isfinite(value) and value > 0) for value in values):
                raise InvalidProblemError(f"{self.name}: {name} must be finite and > 0")
        if (self.prompt is None) != (self.decode is None):
            raise InvalidProblemError(f"{self.name}: prompt and decode times are given together or not at all")

    def prompt_table(self, held: int) -> TimeTable:
        """Return seconds per layer by prompt tokens on a node that holds ``held`` layers."""
        return self.prompt or self._from_rate(held)

    def decode_table(self, held: int) -> TimeTable:
        """Return seconds per layer by decoding sequences on a node that holds ``held`` layers."""
        return self.decode or self._from_rate(held)

    def _from_rate(self, held: int) -> TimeTable:
        """Return times in proportion to tokens at the measured rate, which is all that a rate implies for batches."""
        return TimeTable(sizes=(0.0, 1.0), seconds=(0.0, 1 / (held * self.tokens_per_s[held - 1])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """The links between any two nodes: the card of each node sends and receives at ``bandwidth`` bytes per second."""

    bandwidth: float
    latency_s: float
    activation_bytes: int  # bytes of one token's activations between any two layers

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise InvalidProblemError(f"bandwidth is {self.bandwidth}, must be > 0")
        for name, value in (("latency", self.latency_s), ("activation_bytes", self.activation_bytes)):
            if not (math.isfinite(value) and value >= 0):
                raise InvalidProblemError(f"{name} is {value}, must be finite and >= 0")

    @property
    def token_s(self) -> float:
        """Return the seconds of a card for the activations of one token."""
        return self.activation_bytes / self.bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersProblem:
    """The question of which layers each node should hold so that the most requests per second are served.

    Attributes:
        name: a name for people.
        num_layers: layers of the model, which all cost the same.
        mean_prompt_tokens, mean_output_tokens: tokens of a request.
    """

    name: str
    num_layers: int
    node_types: tuple[NodeType, ...]
    mean_prompt_tokens: float
    mean_output_tokens: float
    links: Links

    def __post_init__(self) -> None:
        if not 1 <= self.num_layers <= MAX_LAYERS:
            raise InvalidProblemError(f"num_layers is {self.num_layers}, must be 1 to {MAX_LAYERS}")
        if not self.node_types:
            raise InvalidProblemError("there are no node types")
        if len({kind.name for kind in self.node_types}) < len(self.node_types):
            raise InvalidProblemError("two node types have one name")
        if self.num_nodes > MAX_NODES:
            raise InvalidProblemError(f"there are {self.num_nodes} nodes, at most {MAX_NODES} are searched")
        for name in ("mean_prompt_tokens", "mean_output_tokens"):
            value: float = getattr(self, name)
            if not (math.isfinite(value) and value >= 1):
                raise InvalidProblemError(f"{name} is {value}, must be finite and >= 1")

    @property
    def num_nodes(self) -> int:
        return sum(kind.count for kind in self.node_types)

    @property
    def tokens_per_request(self) -> float:
        """Return the tokens of a request that a node on its path computes, prompt and output."""
        return self.mean_prompt_tokens + self.mean_output_tokens

    @property
    def tokens_in_flight(self) -> float:
        """Return the KV tokens per layer of a request in flight, which is longer than the mean request."""
        return self.mean_prompt_tokens + OUTPUT_STRETCH * self.mean_output_tokens

    def most_layers(self, kind: NodeType) -> int:
        """Return the layers that a node of this type can hold."""
        return min(len(kind.tokens_per_s), self.num_layers)

    def node_names(self) -> Iterator[tuple[str, NodeType]]:
        """Yield every node as ``T4-0``, ``T4-1``, ... with its type, in the order of the types."""
        for kind in self.node_types:
            for n in range(kind.count):
                yield f"{kind.name}-{n}", kind
