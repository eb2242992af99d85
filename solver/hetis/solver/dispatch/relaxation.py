"""The relaxation in fractions of head groups: the chain, with every device on its binding row or a mix of two.

A device with several rows (affine pieces, memory, the primary's network card; `rows`) is put into the chain with one of
them. Ignoring the others can only lower the level, so if none of them is violated the answer is exact. If one is
violated, the device switches to it. If the device then violates the first, both bind in the optimum, at weights 1 - w
and w: the mix ``(1-w) row + w other`` is again one affine row, a valid consequence of the two. w is found by bisection
for all such devices at once. Every round proves a lower bound, and the best is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.chain import TINY, level
from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.dispatch.rows import DeviceRows
from hetis.solver.dispatch.tables import Running

SETTLED = 1e-9  # violation of a row, as a ratio to the level, up to which it counts as kept
NARROW = 1e-3  # width of a weight's bracket below which it is widened again, because other devices have changed


class ChainMix(NamedTuple):
    """The binding row of every device in the chain: (1 - weight) of row ``low`` plus weight of row ``high``; all [D].

    Of the two, ``high`` charges more for tokens and less for groups. ``price`` is that of a second of the mixed row.
    """

    low: IntArray
    high: IntArray
    weight: FloatArray
    price: FloatArray


class ChainRelaxation(NamedTuple):
    """The least level found for the chain, and its proof.

    The level ignores the time of the running load: it is that of the devices that still have room, so that ties at a
    bottleneck that nothing can lower are broken by filling the next one.
    """

    level_s: float
    settled: bool  # no row is violated at that level
    mix: ChainMix
    order: IntArray


@kernel
def relax(
    rows: DeviceRows, running: Running, guess: float, contexts: FloatArray, blocks: FloatArray, head_groups: int,
    most_rounds: int,
) -> ChainRelaxation:  # fmt: skip
    """Solve the relaxation for requests sorted by context; ``contexts`` and ``blocks`` [J], ``guess`` a level."""
    num = len(rows.block_scale)
    alpha, beta, base, kappa = np.empty(num), np.empty(num), np.empty(num), np.empty(num)
    groups, tokens, held, key = np.empty(num), np.empty(num), np.empty(num), np.empty(num)
    first = _first_rows(rows, guess, contexts.mean())
    now = ChainMix(first, first.copy(), np.zeros(num), np.ones(num))
    best = ChainMix(first.copy(), first.copy(), np.zeros(num), np.ones(num))
    under, over = np.zeros(num), np.ones(num)  # bracket of every weight
    order = np.arange(num)
    best_level, z = -1.0, guess
    for turn in range(most_rounds):
        for i in range(num):
            w, low, high = now.weight[i], now.low[i], now.high[i]
            alpha[i] = (1.0 - w) * rows.alpha[i, low] + w * rows.alpha[i, high]
            beta[i] = (1.0 - w) * rows.beta[i, low] + w * rows.beta[i, high]
            base[i] = (1.0 - w) * rows.base[i, low] + w * rows.base[i, high]
            kappa[i] = (1.0 - w) * rows.kappa[i, low] + w * rows.kappa[i, high]
            key[i] = -beta[i] / max(alpha[i] + beta[i] * contexts[0], TINY)
        if turn == 0:
            order = np.argsort(key)
        else:
            sort_again(key, order)
        z = level(
            z, order, alpha, beta, kappa, base, running.open_at, contexts, blocks, head_groups, groups, tokens, held,
            now.price,
        )  # fmt: skip
        if z == np.inf:
            return ChainRelaxation(best_level, False, best, order)
        if z > best_level:
            best_level = z
            for i in range(len(now.low)):
                best.low[i], best.high[i], best.weight[i] = now.low[i], now.high[i], now.weight[i]
            for j in range(len(now.price)):
                best.price[j] = now.price[j]
        if not _adjust(rows, z, contexts, groups, tokens, held, now, under, over):
            return ChainRelaxation(z, True, now, order)
    return ChainRelaxation(best_level, False, best, order)


@kernel
def sort_again(key: FloatArray, order: IntArray) -> None:
    """Sort ``order`` by ``key``, quickly if it is nearly sorted already."""
    for position in range(1, len(order)):
        i = order[position]
        at = position
        while at > 0 and key[order[at - 1]] > key[i]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i


@kernel
def _first_rows(rows: DeviceRows, guess: float, context: float) -> IntArray:
    """Return the piece that binds first when requests of the mean context fill a device to the guessed level, [D]."""
    num, width = rows.alpha.shape
    first = np.zeros(num, np.int64)
    for i in range(num):
        least = np.inf
        for k in range(width - 2):
            fits = (guess - rows.base[i, k]) / (rows.alpha[i, k] + rows.beta[i, k] * context + TINY)
            if fits < least:
                least = fits
                first[i] = k
    return first


@kernel
def _adjust(
    rows: DeviceRows, z: float, contexts: FloatArray, groups: FloatArray, tokens: FloatArray, held: FloatArray,
    now: ChainMix, under: FloatArray, over: FloatArray,
) -> bool:  # fmt: skip
    """Move every device with violated rows towards the row violated most; return whether there was any."""
    num, width = rows.alpha.shape
    memory, nic = width - 2, width - 1
    any_broken = False
    for i in range(num):
        worst, most = 0, -np.inf
        at_low, at_high = 0.0, 0.0
        for k in range(width):
            use = rows.alpha[i, k] * groups[i] + rows.beta[i, k] * tokens[i]
            if k == memory:
                if held[i] > 0.0 and use > 0.0:
                    # Blocks are not affine in the context, so the row counts as many as were really needed here.
                    real = held[i] * rows.block_scale[i] / use
                    rows.alpha[i, k] *= real
                    rows.beta[i, k] *= real
                    use *= real
            elif k == nic and rows.kappa[i, k] == 0.0:
                continue
            broken = (use + rows.base[i, k] - rows.kappa[i, k] * z) / z
            if k < memory and groups[i] == 0.0:
                broken = 0.0  # an idle device may remain below its constants
            if broken > most:
                worst, most = k, broken
            if k == now.low[i]:
                at_low = broken
            if k == now.high[i]:
                at_high = broken
        if most <= SETTLED:
            continue
        any_broken = True
        if worst != now.low[i] and worst != now.high[i]:
            _go_to(rows, i, worst, contexts[0], now, under, over)
            continue
        if at_high > at_low:
            under[i] = now.weight[i]
            if over[i] - under[i] < NARROW:
                over[i] = min(_most_weight(rows, i, now, contexts[0]), over[i] + 0.1)
        else:
            over[i] = now.weight[i]
            if over[i] - under[i] < NARROW:
                under[i] = max(0.0, under[i] - 0.1)
        now.weight[i] = 0.5 * (under[i] + over[i])
    return any_broken


@kernel
def _go_to(
    rows: DeviceRows, i: int, worst: int, shortest: float, now: ChainMix, under: FloatArray, over: FloatArray
) -> None:
    """Put device i on its row ``worst``, with its previous row at the other end of the bracket."""
    nic = rows.alpha.shape[1] - 1
    came_from = now.high[i] if now.weight[i] > 0.5 else now.low[i]
    rises = worst == nic or (
        rows.beta[i, worst] * rows.alpha[i, came_from] > rows.beta[i, came_from] * rows.alpha[i, worst]
    )
    if came_from == nic:
        rises = False
    under[i], over[i] = 0.0, 1.0
    if rises:
        now.low[i], now.high[i], now.weight[i] = came_from, worst, 1.0
        over[i] = _most_weight(rows, i, now, shortest)
        if over[i] < 1.0:
            now.weight[i] = 0.5 * over[i]
    else:
        now.low[i], now.high[i], now.weight[i] = worst, came_from, 0.0


@kernel
def _most_weight(rows: DeviceRows, i: int, now: ChainMix, shortest: float) -> float:
    """Return 1, or less for the network card, whose row pays for groups: a mix must still charge for every request."""
    if rows.alpha[i, now.high[i]] >= 0.0:
        return 1.0
    charge = float(rows.alpha[i, now.low[i]] + rows.beta[i, now.low[i]] * shortest)
    return 0.999 * charge / (charge - float(rows.alpha[i, now.high[i]]))
