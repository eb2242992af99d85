"""The relaxation in fractions of head groups: a chain of devices, each on its binding row or a mix of two.

**Chain.** If each device is limited by one affine row, the relaxation is exact and quick to solve (`chain.py`).

**Rows.** Every limit on a device is a row over the n head groups and t context tokens (summed over groups) it is given,
``alpha n + beta t + base <= kappa z`` for a makespan of z seconds:

    row k < K   affine piece k       alpha = r (a + gamma e), beta = bytes b, base: time of the running load, kappa 1
    row K       free KV blocks       kappa 0, scaled to seconds. ceil((context + growth) / block) is not affine in the
                                     context: this row only guides the search; placements and bounds count real blocks
    row K + 1   the primary's network card, kappa 1. All N groups go somewhere, so workers do what the primary does not:
                                     alpha = -eta, beta 0, base = time for the running workers + eta N. Other devices
                                     have no such row (all 0)

**Mixes.** A device is put into the chain with one of its rows. Ignoring the others can only lower the level, so if none
of them is violated the answer is exact. If one is violated, the device switches to it. If the device then violates the
first, both bind in the optimum, at weights 1 - w and w: the mix ``(1-w) row + w other`` is again one affine row that
follows from the two. w is found by bisection for all such devices at once. Every round proves a lower bound, and the
best is kept.

**Fill.** A fractional placement along the chain that keeps every row and every real KV block is the upper bound.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.certificate import Multipliers
from hetis.solver.dispatch.chain import TINY, Chain, Demand, level
from hetis.solver.dispatch.dispatch_problem import FloatArray, IntArray
from hetis.solver.dispatch.loaded_stage import LoadedStage, card_s, kernel

SETTLED = 1e-9  # violation of a row, as a ratio to the level, up to which it counts as kept
NARROW = 1e-3  # width of a weight's bracket below which it is widened again, because other devices have changed
MOST_FILLS = 12
FULL = 1e-12  # share of all groups that may be left for the last device, from rounding of the level


class DeviceRows(NamedTuple):
    """Rows of all devices, [D, R] with R = K + 2; ``block_scale`` [D] is the seconds per block in row K."""

    alpha: FloatArray
    beta: FloatArray
    base: FloatArray
    kappa: FloatArray
    block_scale: FloatArray


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


# --- rows and their mixes


@kernel
def rows_of(stage: LoadedStage, free_blocks: IntArray, demand: Demand) -> DeviceRows:
    """Return all rows of all devices."""
    contexts, blocks = demand.contexts, demand.blocks
    num, pieces = stage.alpha.shape
    shape = (num, pieces + 2)
    alpha, beta, base, kappa = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape)
    block_scale = np.zeros(num)
    mean, mean_blocks = contexts.mean(), blocks.mean()
    spread, together = 0.0, 0.0
    for j in range(len(contexts)):
        spread += (contexts[j] - mean) ** 2
        together += (contexts[j] - mean) * (blocks[j] - mean_blocks)
    per_token = max(0.0, together / spread) if spread > 0.0 else 0.0
    per_group = mean_blocks - per_token * mean
    if per_group < 0.0:
        per_group, per_token = 0.0, mean_blocks / mean
    for i in range(num):
        for k in range(pieces):
            alpha[i, k], beta[i, k] = stage.alpha[i, k], stage.beta[i, k]
            base[i, k], kappa[i, k] = stage.base[i, k], 1.0
        scale = (stage.alpha[i, 0] + stage.beta[i, 0] * mean + TINY) / mean_blocks
        alpha[i, pieces] = scale * per_group
        beta[i, pieces] = scale * per_token
        base[i, pieces] = -scale * max(0, free_blocks[i])
        block_scale[i] = scale
    if stage.primary >= 0 and num > 1:
        i = stage.primary
        alpha[i, pieces + 1] = -stage.nic_group_s
        base[i, pieces + 1] = stage.nic_base + stage.nic_group_s * stage.head_groups * len(contexts)
        kappa[i, pieces + 1] = 1.0
    return DeviceRows(alpha, beta, base, kappa, block_scale)


@kernel
def likely_level(rows: DeviceRows, stage: LoadedStage, context: float, num_groups: float) -> float:
    """Return a level near the optimum, at which groups of equal ``context`` would fill every device's affine pieces."""
    num, width = rows.alpha.shape
    z = TINY
    for i in range(num):
        opens = stage.open_at[i] if stage.open_at[i] > 0.0 else rows.base[i, : width - 2].max()
        z = max(z, opens)
    for _ in range(12):
        held, slope = 0.0, 0.0
        for i in range(num):
            if stage.open_at[i] > z:
                continue
            least, per_second = np.inf, 0.0
            for k in range(width - 2):
                cost = rows.alpha[i, k] + rows.beta[i, k] * context + TINY
                fits = (z - rows.base[i, k]) / cost
                if fits < least:
                    least, per_second = fits, 1.0 / cost
            if least >= 0.0:
                held += least
                slope += per_second
        if slope == 0.0:
            break
        step = (num_groups - held) / slope
        z = max(TINY, z + step)
        if abs(step) < 1e-3 * z:
            break
    return z


@kernel
def prices_of(rows: DeviceRows, mix: ChainMix) -> Multipliers:
    """Return the multipliers that correspond to the prices of mixed rows."""
    num, width = rows.alpha.shape
    pieces = width - 2
    piece, block, nic = np.zeros((num, pieces)), np.zeros(num), 0.0
    for i in range(num):
        for row, share in ((mix.low[i], 1.0 - mix.weight[i]), (mix.high[i], mix.weight[i])):
            if row < pieces:
                piece[i, row] += share * mix.price[i]
            elif row == pieces:
                block[i] += share * mix.price[i] * rows.block_scale[i]
            else:
                nic += share * mix.price[i]
    return Multipliers(piece, block, nic)


@kernel
def relax(rows: DeviceRows, stage: LoadedStage, guess: float, demand: Demand, most_rounds: int) -> ChainRelaxation:
    """Solve the relaxation; ``guess`` is a level."""
    num = len(rows.block_scale)
    chain = Chain(
        np.arange(num), np.empty(num), np.empty(num), np.empty(num), np.empty(num), stage.open_at, np.empty(num),
        np.empty(num), np.empty(num),
    )  # fmt: skip
    key = np.empty(num)
    shortest = demand.contexts[0]
    first = _first_rows(rows, guess, demand.contexts.mean())
    now = ChainMix(first, first.copy(), np.zeros(num), np.ones(num))
    best = ChainMix(first.copy(), first.copy(), np.zeros(num), np.ones(num))
    under, over = np.zeros(num), np.ones(num)  # bracket of every weight
    best_level, z = -1.0, guess
    for turn in range(most_rounds):
        for i in range(num):
            w, low, high = now.weight[i], now.low[i], now.high[i]
            chain.alpha[i] = (1.0 - w) * rows.alpha[i, low] + w * rows.alpha[i, high]
            chain.beta[i] = (1.0 - w) * rows.beta[i, low] + w * rows.beta[i, high]
            chain.base[i] = (1.0 - w) * rows.base[i, low] + w * rows.base[i, high]
            chain.kappa[i] = (1.0 - w) * rows.kappa[i, low] + w * rows.kappa[i, high]
            key[i] = -chain.beta[i] / max(chain.alpha[i] + chain.beta[i] * shortest, TINY)
        if turn == 0:
            for position, i in enumerate(np.argsort(key)):
                chain.order[position] = i
        else:
            sort_again(key, chain.order)
        z = level(z, chain, demand, now.price)
        if z == np.inf:
            return ChainRelaxation(best_level, False, best, chain.order)
        if z > best_level:
            best_level = z
            for i in range(num):
                best.low[i], best.high[i] = now.low[i], now.high[i]
                best.weight[i], best.price[i] = now.weight[i], now.price[i]
        if not _adjust(rows, z, shortest, chain, now, under, over):
            return ChainRelaxation(z, True, now, chain.order)
    return ChainRelaxation(best_level, False, best, chain.order)


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
    rows: DeviceRows, z: float, shortest: float, chain: Chain, now: ChainMix, under: FloatArray, over: FloatArray
) -> bool:
    """Move every device with violated rows towards the row violated most; return whether there was any."""
    num, width = rows.alpha.shape
    memory, nic = width - 2, width - 1
    any_broken = False
    for i in range(num):
        worst, most = 0, -np.inf
        at_low, at_high = 0.0, 0.0
        for k in range(width):
            use = rows.alpha[i, k] * chain.groups[i] + rows.beta[i, k] * chain.tokens[i]
            if k == memory:
                if chain.held[i] > 0.0 and use > 0.0:
                    # Blocks are not affine in the context, so the row counts as many as were really needed here.
                    real = chain.held[i] * rows.block_scale[i] / use
                    rows.alpha[i, k] *= real
                    rows.beta[i, k] *= real
                    use *= real
            elif k == nic and rows.kappa[i, k] == 0.0:
                continue
            broken = (use + rows.base[i, k] - rows.kappa[i, k] * z) / z
            if k < memory and chain.groups[i] == 0.0:
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
            _go_to(rows, i, worst, shortest, now, under, over)
            continue
        if at_high > at_low:
            under[i] = now.weight[i]
            if over[i] - under[i] < NARROW:
                over[i] = min(_most_weight(rows, i, now, shortest), over[i] + 0.1)
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
    """Return 1, or less for the network card, whose row pays for groups: a mix must still charge every request."""
    if rows.alpha[i, now.high[i]] >= 0.0:
        return 1.0
    charge = float(rows.alpha[i, now.low[i]] + rows.beta[i, now.low[i]] * shortest)
    return 0.999 * charge / (charge - float(rows.alpha[i, now.high[i]]))


# --- the upper bound


@kernel
def fractional_fill(
    stage: LoadedStage, free_blocks: IntArray, demand: Demand, order: IntArray, price: FloatArray, level: float,
    x: FloatArray,
) -> float:  # fmt: skip
    """Fill the devices in ``order`` at about the least level, from ``level`` on, that takes all groups.

    Writes fractions x [J, D] and returns the makespan, or infinity if the order leaves groups without memory.
    """
    z = level * (1.0 + 1e-13)
    total = demand.head_groups * len(demand.contexts)
    for _ in range(MOST_FILLS):
        left, unpaid, slope = _fill_to(stage, free_blocks, demand, order, price, z, x)
        if left <= FULL * total:
            return _settle(stage, x, order, z, left)
        if slope <= 0.0:
            break
        z = max(z * (1.0 + 1e-9), z + unpaid / slope)
    return np.inf


@kernel
def _fill_to(
    stage: LoadedStage, free_blocks: IntArray, demand: Demand, order: IntArray, price: FloatArray, z: float,
    x: FloatArray,
) -> tuple[float, float, float]:  # fmt: skip
    """Return the groups left at level z, what they would pay, and the price of a second on devices with free memory."""
    pieces = stage.alpha.shape[1]
    contexts, blocks = demand.contexts, demand.blocks
    num_requests = len(contexts)
    x[:] = 0.0
    request, rest = 0, float(demand.head_groups)
    slope = 0.0
    for i in order:
        if request == num_requests:
            break
        if stage.open_at[i] > z:
            continue
        groups, tokens = 0.0, 0.0
        room = float(max(0, free_blocks[i]))
        while request < num_requests:
            fits = min(rest, room / max(blocks[request], TINY))
            by_memory = fits < rest
            for k in range(pieces):
                spare = z - stage.base[i, k] - stage.alpha[i, k] * groups - stage.beta[i, k] * tokens
                cost = stage.alpha[i, k] + stage.beta[i, k] * contexts[request] + TINY
                if spare < fits * cost:
                    fits = max(0.0, spare / cost)
                    by_memory = False
            x[request, i] += fits
            groups += fits
            tokens += fits * contexts[request]
            room -= fits * blocks[request]
            rest -= fits
            if rest > 0.0:
                if not by_memory:
                    slope += price[i]
                break
            request += 1
            rest = float(demand.head_groups)
    last = order[-1]
    left, unpaid = 0.0, 0.0
    for j in range(request, num_requests):
        groups = rest if j == request else float(demand.head_groups)
        left += groups
        unpaid += groups * price[last] * (stage.alpha[last, 0] + stage.beta[last, 0] * contexts[j])
    return left, unpaid, slope


@kernel
def _settle(stage: LoadedStage, x: FloatArray, order: IntArray, z: float, left: float) -> float:
    """Give what rounding left to the last device in use; return the makespan including the network card's."""
    num_requests, num = x.shape
    if left > 0.0:
        for i in order[::-1]:
            if x[num_requests - 1, i] > 0.0:
                x[num_requests - 1, i] += left
                break
    on_workers = 0.0
    for j in range(num_requests):
        for i in range(num):
            if i != stage.primary:
                on_workers += x[j, i]
    return max(z, stage.floor_s, card_s(stage, on_workers))
