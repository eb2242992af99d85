"""The performance of a GPU type: operator times as maxima of affine pieces, usable memory, and where numbers come from.

Every operator's time is ``max_k (fixed_s + flop_s F + byte_s B + token_s T + head_s H + wire W)`` over a few pieces k.
The features of each operator are listed at `Op`. A maximum of affine functions covers a roofline (one piece for
compute, one for memory), a fit to measurements, and the linear model of Hetis (SC'25), and it is convex.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec


class Op(StrEnum):
    """Operators of the cost model. Sizes are those of one tensor-parallel rank and one layer.

    ========================  ========================================================================================
    ``dense``                 all matrix products of a layer for T tokens: F FLOPs, B bytes of weights and activations
    ``experts``               the part of ``dense`` for routed experts, if a profile has it separately: F, B, T
    ``prefill_attention``     a chunk of T tokens attends to itself and its past: F FLOPs, B bytes of KV read,
                              H (token, query head) pairs
    ``decode_attention``      a batch of single tokens: F FLOPs, B bytes of KV read (g in Hetis), H query heads (h)
    ``all_reduce``            B message bytes; W = ``2 (n-1)/n B / link bandwidth``, the wire time of a ring
    ``transfer``              B message bytes; W = ``B / link bandwidth``; the link's latency is added separately
    ``step``                  an engine's overhead per iteration and stage, whatever the batch: T tokens
    ``sample``                an engine's overhead for each of the T sequences with logits in an iteration, on the
                              stage of the LM head: sampling, detokenising, their place in the next batch
    ========================  ========================================================================================
    """

    DENSE = "dense"
    EXPERTS = "experts"
    PREFILL_ATTENTION = "prefill_attention"
    DECODE_ATTENTION = "decode_attention"
    ALL_REDUCE = "all_reduce"
    TRANSFER = "transfer"
    STEP = "step"
    SAMPLE = "sample"


class Source(StrEnum):
    """The origin of a number, from the most to the least trusted."""

    MEASURED = "measured"
    IMPORTED = "imported"
    FITTED = "fitted"
    MODELLED = "modelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """The origin of a fit and its known error."""

    source: Source
    origin: str  # data set, engine, version, kernel; or the related model that was scaled
    held_out_mape: float | None = None  # mean absolute percentage error on points held out of the fit; 0.1 is 10%
    range_error: float | None = None  # 0.5: nine in ten true times lie within 1/1.5 and 1.5 times those of the fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One affine piece; every coefficient is >= 0, so more work never takes less time."""

    fixed_s: float = 0.0
    flop_s: float = 0.0  # seconds per FLOP
    byte_s: float = 0.0  # seconds per byte
    token_s: float = 0.0  # seconds per token
    head_s: float = 0.0  # seconds per query head
    wire: float = 0.0  # seconds per second of nominal wire time; 1 / efficiency

    def __post_init__(self) -> None:
        for name in ("fixed_s", "flop_s", "byte_s", "token_s", "head_s", "wire"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InvalidProblemError(f"profile coefficient {name} is {value}, must be finite and >= 0")

    def seconds(self, *, flops: float, num_bytes: float, tokens: float, heads: float, wire_s: float) -> float:
        return (
            self.fixed_s
            + self.flop_s * flops
            + self.byte_s * num_bytes
            + self.token_s * tokens
            + self.head_s * heads
            + self.wire * wire_s
        )


# Formats that kernels expand to 16 bits before they multiply, although a weight of int4 has the bytes of one of MXFP4.
_STORED_ONLY = ("int4", "awq-int4", "gptq-int4", "bnb-int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitScope:
    """The conditions under which a fit applies; None means any. The fit with the most matching conditions wins.

    ``weights`` is the number format of the weights as in `ModelSpec.weights`, and ``int4`` whoever packed them.
    ``state_flops`` is the number of FLOPs of linear attention for one token and query head, averaged over all layers:
    the same for all models that have it in the same share of layers and with the same sizes.
    """

    model: str | None = None
    tp: int | None = None
    head_dim: int | None = None
    queries_per_group: int | None = None
    weights: str | None = None
    weight_bytes: float | None = None
    state_flops: float | None = None

    def specificity(self, model: ModelSpec, tp: int) -> int | None:
        """Return the number of conditions that match, or None if one does not."""
        if self.tp not in (None, tp):  # the first to differ, and the quickest to compare
            return None
        num = int(self.tp is not None)
        for name, of_model in _OF_MODEL.items():
            condition = getattr(self, name)
            if condition is not None:
                if condition != of_model(model):
                    return None
                num += 1
        if self.weight_bytes is not None and self.weight_bytes < 1.0 and model.weights in _STORED_ONLY:
            return None
        return num


_OF_MODEL: dict[str, Callable[[ModelSpec], str | float]] = {  # what the conditions of a scope compare with
    "model": lambda model: model.name,
    "head_dim": lambda model: model.head_dim,
    "queries_per_group": lambda model: model.queries_per_group,
    "weights": lambda model: "int4" if model.weights in _STORED_ONLY else model.weights,
    "weight_bytes": lambda model: model.weight_bytes,
    "state_flops": lambda model: model.state_flops() / model.q_heads,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRegion:
    """The measured region: closed ranges within which a fit may be trusted; None means no limit.

    Attributes:
        tokens: tokens in one call (dense: in the iteration; prefill attention: in the chunk).
        batch: sequences in one call.
        past_tokens: KV tokens before a chunk, per sequence.
        context_tokens: KV tokens per sequence, including a chunk's own.
        kv_bytes: KV bytes that one call reads; limited separately, since no table has its largest batch at its longest
            context.
        num_bytes: bytes of a message.
    """

    tokens: tuple[float, float] | None = None
    batch: tuple[float, float] | None = None
    past_tokens: tuple[float, float] | None = None
    context_tokens: tuple[float, float] | None = None
    kv_bytes: tuple[float, float] | None = None
    num_bytes: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in REGION_FIELDS:
            limits = getattr(self, name)
            if limits is not None and not 0 <= limits[0] <= limits[1] < float("inf"):
                raise InvalidProblemError(
                    f"fit region {name} is {limits[0]:g} to {limits[1]:g}, must rise from a number >= 0"
                )

    def outside(self, **sizes: float) -> tuple[str, ...]:
        """Return the names of the ``sizes`` (``tokens=512, batch=4``) that are out of range, in the order given."""
        return tuple(
            name
            for name, size in sizes.items()
            if (limits := getattr(self, name)) is not None and not limits[0] <= size <= limits[1]
        )


REGION_FIELDS = ("tokens", "batch", "past_tokens", "context_tokens", "kv_bytes", "num_bytes")


MOST_MIXED_FACTOR = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """The time of decode attention in an iteration that also has a prefill chunk, as a multiple of its time alone.

    A kernel for both may use a GPU better than two kernels do (a factor under 1). Or, beside a chunk, it may neither
    pack the query heads of a group nor split long contexts, both of which it does for decoding requests alone.
    """

    factor: float
    provenance: Provenance

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= MOST_MIXED_FACTOR:
            raise InvalidProblemError(
                f"profile factor of mixed batches is {self.factor}, must be from 0 to {MOST_MIXED_FACTOR:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The time of one operator: a maximum of affine pieces, and the model shapes and sizes for which it holds."""

    op: Op
    pieces: tuple[Piece, ...]
    provenance: Provenance
    scope: FitScope = FitScope()
    region: FitRegion | None = None  # None: its limits are unknown
    mixed: Mixed | None = None  # of decode attention only; None: as long beside a chunk as alone

    def __post_init__(self) -> None:
        if not self.pieces:
            raise InvalidProblemError(f"profile fit of {self.op} has no pieces")
        if self.mixed is not None and self.op is not Op.DECODE_ATTENTION:
            raise InvalidProblemError(f"profile fit of {self.op} has a factor of mixed batches, as only decode has")

    @property
    def mixed_factor(self) -> float:
        """Return mu, the time of decode attention beside a chunk as a multiple of its time alone."""
        return 1.0 if self.mixed is None else self.mixed.factor

    @property
    def start_s(self) -> float:
        """Return the seconds of the smallest call: what its kernels take to start."""
        return min(piece.fixed_s for piece in self.pieces)

    def seconds(
        self,
        *,
        flops: float = 0.0,
        num_bytes: float = 0.0,
        tokens: float = 0.0,
        heads: float = 0.0,
        wire_s: float = 0.0,
    ) -> float:
        return max(
            p.seconds(flops=flops, num_bytes=num_bytes, tokens=tokens, heads=heads, wire_s=wire_s) for p in self.pieces
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Operator times and usable memory of one GPU type."""

    gpu: str
    usable_bytes: int  # for weights, KV and activations together: nominal minus the system's own
    reserve_bytes: int  # part of it that an engine process keeps for itself (context, graphs, workspaces)
    fits: tuple[Fit, ...]
    # The last answers of `fit`, which is asked hundreds of times for each replica that is priced.
    _found: dict[tuple[Op, int], tuple[ModelSpec, Fit | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.usable_bytes <= 0 or self.reserve_bytes < 0:
            raise InvalidProblemError(
                f"profile of {self.gpu}: usable_bytes is {self.usable_bytes} and reserve_bytes {self.reserve_bytes}, "
                "must be > 0 and >= 0"
            )
        missing = {Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION, Op.ALL_REDUCE, Op.TRANSFER} - {
            fit.op for fit in self.fits
        }
        if missing:
            raise InvalidProblemError(f"profile of {self.gpu} has no fit for {', '.join(sorted(missing))}")

    @property
    def room_bytes(self) -> int:
        """Return the bytes for weights, KV and activations: usable memory minus the engine's own."""
        return self.usable_bytes - self.reserve_bytes

    def beside(self, reserved_bytes: int) -> Profile:
        """Return the profile of a GPU of which others hold so much."""
        return self if not reserved_bytes else replace(self, usable_bytes=max(1, self.usable_bytes - reserved_bytes))

    def fit(self, op: Op, model: ModelSpec, tp: int) -> Fit | None:
        """Return the most specific fit of ``op`` for this model and TP size, or None if there is none at all."""
        known, best = self._found.get((op, tp), (None, None))
        if known is model:
            return best
        best, best_rank = None, -1
        for candidate in self.fits:
            rank = candidate.scope.specificity(model, tp) if candidate.op is op else None
            if rank is not None and rank > best_rank:
                best, best_rank = candidate, rank
        self._found[op, tp] = model, best
        return best
