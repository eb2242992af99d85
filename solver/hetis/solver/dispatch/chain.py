"""The chain by comparative advantage, which is exact if each device is limited by one affine row.

A head group with context l costs ``alpha_i + beta_i l`` on device i. At prices p_i per second of every device a request
pays ``min_i p_i (alpha_i + beta_i l)``, a lower envelope of lines in l. In an optimum, the devices sorted by falling
``beta_i / alpha_i`` therefore take the requests sorted by rising context as one chain (comparative advantage). Filling
the chain to a level z tells whether z is enough. The contexts at which one device hands over to the next give prices,
which prove the next, higher level (Newton's method on a convex function of finitely many pieces).
"""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.problem import FloatArray, IntArray

TINY = 1e-24  # seconds; a device with zero costs would have an infinite price
MOST_STEPS = 200


@kernel
def fill(
    z: float, order: IntArray, alpha: FloatArray, beta: FloatArray, kappa: FloatArray, base: FloatArray,
    open_at: FloatArray, contexts: FloatArray, blocks: FloatArray, head_groups: int, groups: FloatArray,
    tokens: FloatArray, held: FloatArray, price: FloatArray,
) -> tuple[float, float]:  # fmt: skip
    """Fill devices in ``order`` up to level z, with row ``alpha n + beta t + base <= kappa z`` each.

    Writes the groups, tokens and KV blocks of every device, and prices under which no other order is better, all [D].
    ``contexts`` [J] are sorted, and each request has ``head_groups`` groups. Returns what all groups pay at these
    prices, and the part of it that found no room.
    """
    last = len(contexts) - 1
    request, rest = 0, float(head_groups)
    paid, value = 0.0, 1.0  # value: price of a group of the request at the hand-over
    cost, p = 1.0, 1.0
    for i in order:
        groups[i] = 0.0
        tokens[i] = 0.0
        held[i] = 0.0
        at = min(request, last)
        cost = max(alpha[i] + beta[i] * contexts[at], TINY)
        p = value / cost
        price[i] = p
        room = kappa[i] * z - base[i]
        if z < open_at[i] or room <= 0.0 or request > last:
            continue
        while True:
            needed = rest * cost
            if needed > room:
                share = room / cost
                groups[i] += share
                tokens[i] += share * contexts[request]
                held[i] += share * blocks[request]
                rest -= share
                paid += p * room
                break
            groups[i] += rest
            tokens[i] += rest * contexts[request]
            held[i] += rest * blocks[request]
            room -= needed
            paid += p * needed
            request += 1
            if request > last:
                break
            rest = float(head_groups)
            cost = max(alpha[i] + beta[i] * contexts[request], TINY)
        value = p * cost
    left = 0.0
    if request <= last:
        i = order[-1]
        left = rest * value
        for later in range(request + 1, last + 1):
            left += head_groups * p * max(alpha[i] + beta[i] * contexts[later], TINY)
    return paid + left, left


@kernel
def level_paid_for(
    z: float, paid: float, kappa: FloatArray, base: FloatArray, open_at: FloatArray, price: FloatArray
) -> float:
    """Return the least level at which ``sum_i price_i max(0, kappa_i z - base_i)`` pays for all groups, a lower bound.

    This is Newton's method on a convex function: first with the devices open at ``z``, which may be on either side of
    the root, then from the right with those open at the last root.
    """
    top = z
    for _ in range(MOST_STEPS):
        slope, offset = 0.0, paid
        for i in range(len(price)):
            if kappa[i] * top - base[i] >= 0.0 and open_at[i] <= top:
                slope += price[i] * kappa[i]
                offset += price[i] * base[i]
        if slope <= 0.0:
            # Nothing that grows with z is open yet, so the next device to open gives the next level.
            following = np.inf
            for i in range(len(price)):
                opens = max(open_at[i], base[i] / kappa[i] if kappa[i] > 0.0 else np.inf)
                if opens > top and price[i] > 0.0:
                    following = min(following, opens)
            if following == np.inf:
                return np.inf
            top = following * (1.0 + 1e-12) + TINY
            continue
        root = offset / slope
        if abs(root - top) <= 1e-15 * abs(root):
            return root
        top = root
    return top


@kernel
def level(
    start: float, order: IntArray, alpha: FloatArray, beta: FloatArray, kappa: FloatArray, base: FloatArray,
    open_at: FloatArray, contexts: FloatArray, blocks: FloatArray, head_groups: int, groups: FloatArray,
    tokens: FloatArray, held: FloatArray, price: FloatArray,
) -> float:  # fmt: skip
    """Return the least z at which `fill` finds room for every group, or infinity; ``start`` is a guess."""
    z = start
    for step in range(MOST_STEPS):
        paid, left = fill(
            z, order, alpha, beta, kappa, base, open_at, contexts, blocks, head_groups, groups, tokens, held, price
        )  # fmt: skip
        root = level_paid_for(z, paid, kappa, base, open_at, price)
        if root == np.inf:
            return root
        if left > 1e-14 * paid and root <= z * (1.0 + 1e-15):
            # Too low, yet the prices prove no more because a device opens with room at once. Go to the next opening.
            following = np.inf
            for i in range(len(open_at)):
                if open_at[i] > z:
                    following = min(following, open_at[i])
            if following == np.inf:
                return z
            z = following
            continue
        if step > 0 and abs(root - z) <= 1e-14 * z:
            return root
        z = root
    return z
