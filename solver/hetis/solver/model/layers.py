"""The layers of a model, and the kinds of attention and of MLP among them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from hetis.solver.model.attention import Grouped
from hetis.solver.model.mixer import Mixer
from hetis.solver.model.mlp import Dense, Experts, Mlp

T = TypeVar("T")
_UNEVEN = 2  # excess layers of one kind in a run, from which stages may not begin or end within it


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer: what it computes from several tokens, and its MLP.

    Each has one part in most models, none where layers are of one kind alone (Nemotron-H), and two where both compute
    side by side: attention and a state space (Falcon-H1), a dense MLP and experts (Gemma 4).
    """

    mixers: tuple[Mixer, ...]
    mlps: tuple[Mlp, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKinds:
    """What a list of layers consists of, each with the number of layers that have it.

    Computed once, because a placement needs it a hundred thousand times.
    """

    mixers: tuple[tuple[Mixer, int], ...]
    attention: tuple[tuple[Mixer, int], ...]  # the mixers that keep KV
    main: Mixer | None  # the kind with KV that most layers have
    groups: int  # the most KV head groups that a layer has
    mlps: tuple[tuple[Mlp, int], ...]  # of repeated layers
    prefix_mlps: tuple[tuple[Mlp, int], ...]
    prefix_layers: int
    inner: int
    even_cuts: frozenset[int] | None  # layers before which a stage may start; None: all
    plain: tuple[Grouped, Dense] | None  # the parts of each layer, windows apart, if all are usual and alike

    @staticmethod
    def of(layers: tuple[Layer, ...]) -> LayerKinds:
        prefix = _prefix(layers)
        mixers = _counted(mixer for layer in layers for mixer in layer.mixers)
        attention = tuple((mixer, count) for mixer, count in mixers if mixer.groups)
        return LayerKinds(
            mixers=mixers,
            attention=attention,
            main=max(attention, key=lambda pair: pair[1])[0] if attention else None,
            groups=max((mixer.groups for mixer, _ in attention), default=0),
            mlps=_counted(mlp for layer in layers[prefix:] for mlp in layer.mlps),
            prefix_mlps=_counted(mlp for layer in layers[:prefix] for mlp in layer.mlps),
            prefix_layers=prefix,
            inner=max(sum(mlp.inner for mlp in layer.mlps) for layer in dict.fromkeys(layers[prefix:])),
            even_cuts=_even_cuts(layers, prefix),
            plain=_plain(layers),
        )


def window_of(mixer: Mixer) -> int | None:
    return mixer.window if isinstance(mixer, Grouped) else None


def without_window(mixer: Mixer) -> Mixer:
    return replace(mixer, window=None) if isinstance(mixer, Grouped) else mixer


def _plain(layers: tuple[Layer, ...]) -> tuple[Grouped, Dense] | None:
    """Return the parts of a layer if all have the same usual grouped attention, windows apart, and dense MLP."""
    kinds = {(tuple(map(without_window, layer.mixers)), layer.mlps) for layer in dict.fromkeys(layers)}
    match next(iter(kinds)) if len(kinds) == 1 else None:
        case ((Grouped() as mixer,), (Dense() as mlp,)) if mixer == Grouped(
            query_heads=mixer.query_heads, kv_heads=mixer.kv_heads, head_dim=mixer.head_dim
        ):
            return mixer, mlp
        case _:
            return None


def _counted(parts: Iterable[T]) -> tuple[tuple[T, int], ...]:
    return tuple(Counter(parts).items())


def _prefix(layers: tuple[Layer, ...]) -> int:
    """Return the number of leading layers with dense MLPs if all behind them have experts; otherwise 0."""
    flags = [any(isinstance(mlp, Experts) for mlp in layer.mlps) for layer in layers]
    first = flags.index(True) if True in flags else 0
    is_dense = all(layer.mlps for layer in layers[:first])
    return first if is_dense and all(flags[first:]) else 0


def _even_cuts(layers: tuple[Layer, ...], prefix: int) -> frozenset[int] | None:
    """Return the layers before which a stage may start, or None if it may start before any.

    A stage is charged the mean of all layers, so every run of layers behind the leading ones must have about its share
    of every kind of attention and of MLP.
    """
    allowed: set[int] | None = None
    repeated = layers[prefix:]
    lists: tuple[Sequence[tuple[Mixer | Mlp, ...]], ...] = (
        [layer.mixers for layer in repeated],
        [layer.mlps for layer in repeated],
    )
    for parts in lists:
        for kind in dict.fromkeys(parts):
            total = len(parts)
            number = parts.count(kind)
            # Running excess over the kind's share, scaled by the number of layers.
            excess = list(itertools.accumulate((total * (one == kind) - number for one in parts), initial=0))
            if max(excess) - min(excess) >= _UNEVEN * total:
                even = {prefix + layer for layer, over in enumerate(excess) if abs(over) < total}
                allowed = even if allowed is None else allowed & even
    return None if allowed is None else frozenset(allowed)
