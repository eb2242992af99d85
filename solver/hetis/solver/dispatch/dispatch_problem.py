"""The dispatch problem: a replica stage, its running load, and the requests whose head groups need a device.

The problem covers one layer of one decode iteration. Device i takes, for h query heads that read g KV bytes (Hetis,
SC'25),

    max_k (a_ik h + b_ik g + c_ik)  +  gamma_i e h + beta_i                      seconds, nothing when h = 0

where e is the bytes that a query head exchanges with the primary. The *primary* (a tensor-parallel group of n cards) is
one device, and the attention workers are the others. Its a and b are those of one card. Heads and KV bytes of the
group are shared evenly by its cards, it exchanges nothing, and it takes n head groups at once so that its cards stay
even. If n exceeds the G head groups of the model, every group is on n / G cards, which share its query heads: heads are
divided by n, KV bytes by G, and the primary takes G groups at once. While any worker holds heads, the primary's network
card also takes ``gamma_0 e (heads on workers) + beta_0`` seconds.

MHA (G = number of heads, r = 1), GQA and MLA (G = 1: one latent, so a request stays whole) differ only in numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec

MOST_TOKENS = 2**31  # context tokens, or growth tokens, of a request
MOST_BLOCKS = 2**40  # free blocks of a device
MOST_HEADS = 2**40  # running heads of a device
MOST_KV_BYTES = 1e18  # running KV bytes of a device
MOST_GROUPS = 2**16  # per layer; also for query heads per group, cards of the primary and tokens of a block
# Within these limits no sum in a kernel exceeds 64 bits.
_MOST_KV_BITS = np.array(MOST_KV_BYTES).view(np.uint64)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """The attention heads of one layer."""

    head_groups: int  # G, KV heads; the smallest unit of placement is one of them with its query heads
    queries_per_group: int  # r, query heads per head group
    kv_bytes_per_token: float  # KV bytes per token of one head group in one layer
    exchange_bytes_per_head: float  # e, bytes per token, layer and query head between primary and attention worker
    block_tokens: int = 16  # token slots of a KV block, which belongs to one head group

    def __post_init__(self) -> None:
        for name in ("head_groups", "queries_per_group", "block_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or not 1 <= value <= MOST_GROUPS:
                raise InvalidProblemError(f"{name} is {value}, must be {_whole(MOST_GROUPS, least=1)}")
        for name in ("kv_bytes_per_token", "exchange_bytes_per_head"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidProblemError(f"{name} is {getattr(self, name)}, must be finite and >= 0")

    @classmethod
    def of_model(cls, model: ModelSpec, *, block_tokens: int = 16) -> HeadShape:
        """Return the heads of ``model``: MHA and GQA by KV head, MLA as one latent group."""
        return cls(
            head_groups=model.head_groups,
            queries_per_group=model.queries_per_group,
            kv_bytes_per_token=model.kv_bytes_per_token_group(),
            exchange_bytes_per_head=model.exchange_bytes_per_head(),
            block_tokens=block_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Primary:
    """The device that computes the dense layers: ``tp`` cards, and the network card that links it to the workers."""

    device: int  # its index among the stage's devices
    tp: int = 1  # n, tensor-parallel cards; a divisor or a multiple of the model's head groups
    nic_byte_s: float = 0.0  # gamma_0, seconds per byte exchanged with all workers together
    nic_s: float = 0.0  # beta_0, seconds per layer while any worker holds heads


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stage:
    """The devices of one replica stage and the cost of attention on them, fixed for the replica's lifetime."""

    heads: HeadShape
    devices: tuple[str, ...]  # names of the D devices
    head_s: FloatArray  # a_ik, seconds per query head, shape [D, K]; a device with fewer pieces repeats one
    kv_byte_s: FloatArray  # b_ik, seconds per KV byte read, shape [D, K]
    call_s: FloatArray  # c_ik, seconds per call, shape [D, K]
    transfer_byte_s: FloatArray  # gamma_i, seconds per byte exchanged, shape [D]; unused for the primary
    transfer_s: FloatArray  # beta_i, seconds per exchange, shape [D]; unused for the primary
    primary: Primary | None = None  # None if all devices are attention workers and no network card is shared

    def __post_init__(self) -> None:
        # Kernels are compiled for these types; for others they would be compiled again, which takes a minute.
        for name in ("head_s", "kv_byte_s", "call_s", "transfer_byte_s", "transfer_s"):
            object.__setattr__(self, name, _reals(name, getattr(self, name)))
        num = len(self.devices)
        if num == 0:
            raise InvalidProblemError("a stage needs at least one device")
        check_names("device", self.devices)
        pieces = self.head_s.shape[1] if self.head_s.ndim == 2 else 0
        if pieces < 1:
            raise InvalidProblemError(f"head_s has shape {self.head_s.shape}, must be [devices, pieces >= 1]")
        for name in ("head_s", "kv_byte_s", "call_s"):
            _check_costs(name, getattr(self, name), (num, pieces), self.devices)
        for name in ("transfer_byte_s", "transfer_s"):
            _check_costs(name, getattr(self, name), (num,), self.devices)
        if self.primary is not None:
            self._check_primary(self.primary)

    def _check_primary(self, primary: Primary) -> None:
        if not 0 <= primary.device < len(self.devices):
            raise InvalidProblemError(f"primary device is {primary.device}, must be one of {len(self.devices)} devices")
        groups = self.heads.head_groups
        if (
            not isinstance(primary.tp, int | np.integer)
            or not 1 <= primary.tp <= MOST_GROUPS
            or (groups % primary.tp and primary.tp % groups)
        ):
            raise InvalidProblemError(
                f"tp of the primary is {primary.tp}, must be a divisor or a multiple of {groups} head groups"
            )
        for name in ("nic_byte_s", "nic_s"):
            if not 0 <= getattr(primary, name) < float("inf"):
                raise InvalidProblemError(f"primary {name} is {getattr(primary, name)}, must be finite and >= 0")

    @property
    def num_devices(self) -> int:
        """Return D."""
        return len(self.devices)

    @property
    def primary_groups(self) -> int:
        """Return how many head groups the primary takes at once: n, or G if its cards outnumber the groups."""
        return 1 if self.primary is None else min(self.primary.tp, self.heads.head_groups)

    def has_primary_at(self, device: int) -> bool:
        """Return whether ``device`` is the primary."""
        return self.primary is not None and self.primary.device == device


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceLoad:
    """The load on devices from the micro-batch that new requests join; for the primary, on all its cards together.

    Attributes:
        heads: running query heads, shape [D].
        kv_bytes: KV bytes that one layer of one iteration reads for them, shape [D]; a group on several cards of the
            primary counts once.
        free_blocks: KV blocks that a layer has left on each device, shape [D], minus those into which the running
            requests are expected to grow; negative numbers count as 0.
    """

    heads: IntArray
    kv_bytes: FloatArray
    free_blocks: IntArray

    def __post_init__(self) -> None:
        # Kernels are compiled for these types, see `Stage`.
        object.__setattr__(self, "heads", _counts("heads", self.heads, MOST_HEADS))
        object.__setattr__(self, "kv_bytes", _reals("kv_bytes", self.kv_bytes))
        object.__setattr__(self, "free_blocks", _counts("free_blocks", self.free_blocks, MOST_BLOCKS, least=None))
        if self.kv_bytes.ndim != 1:
            raise InvalidProblemError(f"kv_bytes has shape {self.kv_bytes.shape}, must be [devices]")
        if not len(self.heads) == len(self.kv_bytes) == len(self.free_blocks):
            raise InvalidProblemError(
                f"heads, kv_bytes and free_blocks are of {len(self.heads)}, {len(self.kv_bytes)} and "
                f"{len(self.free_blocks)} devices, must be of the same"
            )
        # The bits of floats >= 0 are ordered like the floats; those of NaN are above, those with a sign above all.
        if len(self.kv_bytes) and np.maximum.reduce(self.kv_bytes.view(np.uint64)) > _MOST_KV_BITS:
            bad = self.kv_bytes[~((self.kv_bytes >= 0) & (self.kv_bytes <= MOST_KV_BYTES))]
            if len(bad):
                raise InvalidProblemError(f"kv_bytes is {bad[0]}, must be >= 0 and <= {MOST_KV_BYTES:g}")

    @classmethod
    def idle(cls, free_blocks: IntArray) -> DeviceLoad:
        """Return the load of devices that run nothing."""
        return cls(
            heads=np.zeros(len(free_blocks), np.int64), kv_bytes=np.zeros(len(free_blocks)), free_blocks=free_blocks
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Requests:
    """New requests in order of admission; if memory is short, the later ones are left out."""

    ids: tuple[str, ...]  # J different names
    context_tokens: IntArray  # l_j, tokens that a decode step attends to and keeps, shape [J]
    growth_tokens: IntArray  # tokens by which the context is expected to grow, for which memory is kept, shape [J]

    def __post_init__(self) -> None:
        object.__setattr__(self, "context_tokens", _counts("context_tokens", self.context_tokens, MOST_TOKENS, least=1))
        object.__setattr__(self, "growth_tokens", _counts("growth_tokens", self.growth_tokens, MOST_TOKENS))
        num = len(self.ids)
        check_names("request", self.ids)
        if len(self.context_tokens) != num or len(self.growth_tokens) != num:
            raise InvalidProblemError(
                f"{num} requests have {len(self.context_tokens)} contexts and {len(self.growth_tokens)} growths"
            )

    def blocks(self, block_tokens: int) -> IntArray:
        """Return the KV blocks that one head group of each request needs per layer, shape [J]."""
        return -(-(self.context_tokens + self.growth_tokens) // block_tokens)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchProblem:
    """The question of which device each head group of the new requests should be placed on."""

    stage: Stage
    load: DeviceLoad
    requests: Requests

    def __post_init__(self) -> None:
        if len(self.load.heads) != self.stage.num_devices:
            raise InvalidProblemError(
                f"the load is of {len(self.load.heads)} devices, the stage has {self.stage.num_devices}"
            )


def check_names(what: str, names: tuple[str, ...]) -> None:
    """Raise InvalidProblemError if a name is listed twice."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidProblemError(f"{what} {twice} is listed {names.count(twice)} times")


def _counts(name: str, values: IntArray, most: int, *, least: int | None = 0) -> IntArray:
    """Return whole numbers from ``least`` to ``most`` as an array that kernels accept."""
    given = np.asarray(values)
    if given.ndim != 1:
        raise InvalidProblemError(f"{name} has shape {given.shape}, must be one number each")
    if given.dtype != np.int64:
        if len(given) == 0:
            return np.zeros(0, np.int64)
        if given.dtype.kind not in "iuf":
            raise InvalidProblemError(f"{name} are of type {given.dtype}, must be {_whole(most, least=least)}")
        bad = given[~((given >= (-(2**62) if least is None else least)) & (given <= most) & (given == np.floor(given)))]
        if len(bad):
            raise InvalidProblemError(f"{name} is {bad[0]}, must be {_whole(most, least=least)}")
    counts = np.ascontiguousarray(given, np.int64)
    if len(counts):
        if least is None:
            is_within = np.maximum.reduce(counts) <= most
        else:  # one pass for both ends: as unsigned numbers, negative ones are huge
            above = counts - least if least else counts
            is_within = np.maximum.reduce(above.view(np.uint64)) <= most - least
        if not is_within:
            bad = counts[(counts > most) | (counts < (-(2**63) if least is None else least))]
            raise InvalidProblemError(f"{name} is {bad[0]}, must be {_whole(most, least=least)}")
    return counts


def _whole(most: int, *, least: int | None) -> str:
    lower = "" if least is None else f">= {least} and "
    return f"a whole number {lower}<= {most}"


def _reals(name: str, values: FloatArray) -> FloatArray:
    try:
        return np.ascontiguousarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidProblemError(f"{name} is no array of numbers: {error}") from None


def _check_costs(name: str, values: FloatArray, shape: tuple[int, ...], devices: tuple[str, ...]) -> None:
    if values.shape != shape:
        raise InvalidProblemError(f"{name} has shape {values.shape}, must be {shape}")
    bad = np.argwhere(~((values >= 0) & np.isfinite(values)))
    if len(bad):
        where = tuple(bad[0])
        raise InvalidProblemError(f"{devices[where[0]]}: {name} is {values[where]}, must be finite and >= 0")


# --- the answer


class Path(StrEnum):
    """How an answer was found.

    ``chain``: the relaxation was solved exactly as a chain by comparative advantage, every device on one affine piece.
    ``mixed``: two rows at once bind some devices (affine pieces, memory, the primary's network card). The chain was
    solved on mixtures of the two, and is optimal up to the requested tolerance.
    ``lp``: HiGHS solved the relaxation.
    """

    CHAIN = "chain"
    MIXED = "mixed"
    LP = "lp"


class Resource(StrEnum):
    """The resource that an unplaced request lacks.

    ``kv_blocks``: all devices together have too few free KV blocks.
    ``whole_groups``: they have enough, but in pieces smaller than a head group of the request (on the primary, smaller
    than the groups it takes at once).
    """

    KV_BLOCKS = "kv_blocks"
    WHOLE_GROUPS = "whole_groups"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplaced:
    """A request that cannot be placed yet."""

    request: int  # index of the request in the problem
    id: str  # name of the request
    resource: Resource  # what it lacks after the requests admitted before it
    missing: int  # KV blocks per layer for ``kv_blocks``, head groups without room for ``whole_groups``
    # True if no placement holds it in addition to those admitted before it; always so for ``kv_blocks``. The fast path
    # may overlook a packing of whole groups, so it proves nothing in that case.
    proved: bool

    def __str__(self) -> str:
        if self.resource is Resource.KV_BLOCKS:
            return f"request {self.id}: {self.missing} KV blocks per layer are missing"
        if not self.proved:
            return (
                f"request {self.id}: no room was found for {self.missing} head groups; that there is none is unproved"
            )
        return f"request {self.id}: {self.missing} head groups fit on no device; the free blocks are too scattered"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShadowPrices:
    """Multipliers that prove the bound; `hetis.solver.dispatch.certificate` recomputes it from them."""

    # Weight of every affine piece of every device, shape [D, K], >= 0. The weights of devices in use at the bound, plus
    # ``nic``, sum to 1 unless the running load alone is the bound (then all are 0).
    piece: FloatArray
    block_s: FloatArray  # seconds of makespan that one more free KV block on the device saves, shape [D]
    nic: float  # weight of the primary's network card
    request_s: FloatArray  # seconds of makespan that one more head group of the request would cost, shape [J]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchPlan:
    """A placement in whole head groups."""

    groups: IntArray  # head groups of request j on device i, shape [J, D]; rows of unplaced requests are 0
    # Seconds per layer of one decode iteration on the slowest device (or network card), including running requests
    makespan_s: float
    bound_s: float  # no placement of the same requests is faster, as ``prices`` prove
    # Makespan of the best fractional placement found; equal to ``bound_s`` up to rounding on the paths ``chain`` and
    # ``lp``.
    relaxed_s: float
    path: Path  # how the plan was found
    unplaced: tuple[Unplaced, ...]  # requests that were not placed, in order
    prices: ShadowPrices  # the multipliers behind the bound

    @property
    def gap(self) -> float:
        """Return how far the makespan may be above the best, ``makespan_s / bound_s - 1``; 0 if nothing runs."""
        if self.makespan_s <= self.bound_s:
            return 0.0
        return self.makespan_s / self.bound_s - 1.0 if self.bound_s > 0 else np.inf
