"""The chain of devices, each limited by one row: the least level at which it has room for every head group.

If each device is limited by one affine row, a chain by comparative advantage solves the relaxation in fractions
exactly. A head group with context l costs ``alpha_i + beta_i l`` on device i. At prices p_i per second of every device
a request pays ``min_i p_i (alpha_i + beta_i l)``, a lower envelope of lines in l. In an optimum, the devices sorted by
falling ``beta_i / alpha_i`` therefore take the requests sorted by rising context as one chain. Filling the chain to a
level z tells whether z is enough. The contexts at which one device hands over to the next give prices, which prove the
next, higher level (Newton's method on a convex function of finitely many pieces).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.dispatch_problem import FloatArray, IntArray
from hetis.solver.dispatch.loaded_stage import kernel

TINY = 1e-24  # seconds; a device with zero costs would have an infinite price
MOST_STEPS = 200


class Demand(NamedTuple):
    """Requests sorted by context: tokens [J], KV blocks per head group [J], and the head groups of each."""

    contexts: FloatArray
    blocks: FloatArray
    head_groups: int


class Chain(NamedTuple):
    """Devices in ``order``, each with one row, and what they hold at the last level; all [D]."""

    order: IntArray
    alpha: FloatArray
    beta: FloatArray
    kappa: FloatArray
    base: FloatArray
    open_at: FloatArray
    groups: FloatArray
    tokens: FloatArray
    held: FloatArray  # KV blocks


@kernel
def fill(z: float, chain: Chain, demand: Demand, price: FloatArray) -> tuple[float, float]:
    """Fill the chain up to level z; write what every device holds, and a price under which no other order is better.

    Returns what all groups pay at these prices, and the part of it that found no room.
    """
    contexts, alpha, beta = demand.contexts, chain.alpha, chain.beta
    groups, tokens, held = chain.groups, chain.tokens, chain.held
    last = len(contexts) - 1
    request, rest = 0, float(demand.head_groups)
    paid, value = 0.0, 1.0  # value: price of a group of the request at the hand-over
    cost, p = 1.0, 1.0
    for i in chain.order:
        groups[i] = 0.0
        tokens[i] = 0.0
        held[i] = 0.0
        at = min(request, last)
        cost = max(alpha[i] + beta[i] * contexts[at], TINY)
        p = value / cost
        price[i] = p
        room = chain.kappa[i] * z - chain.base[i]
        if z < chain.open_at[i] or room <= 0.0 or request > last:
            continue
        while True:
            needed = rest * cost
            if needed > room:
                share = room / cost
                groups[i] += share
                tokens[i] += share * contexts[request]
                held[i] += share * demand.blocks[request]
                rest -= share
                paid += p * room
                break
            groups[i] += rest
            tokens[i] += rest * contexts[request]
            held[i] += rest * demand.blocks[request]
            room -= needed
            paid += p * needed
            request += 1
            if request > last:
                break
            rest = float(demand.head_groups)
            cost = max(alpha[i] + beta[i] * contexts[request], TINY)
        value = p * cost
    left = 0.0
    if request <= last:
        i = chain.order[-1]
        left = rest * value
        for later in range(request + 1, last + 1):
            left += demand.head_groups * p * max(alpha[i] + beta[i] * contexts[later], TINY)
    return paid + left, left


@kernel
def level_paid_for(z: float, paid: float, chain: Chain, price: FloatArray) -> float:
    """Return the least level at which ``sum_i price_i max(0, kappa_i z - base_i)`` pays for all groups: a lower bound.

    This is Newton's method on a convex function: first with the devices open at ``z``, which may be on either side of
    the root, then from the right with those open at the last root.
    """
    kappa, base, open_at = chain.kappa, chain.base, chain.open_at
    top = z
    for _ in range(MOST_STEPS):
        slope, offset = 0.0, paid
        for i in range(len(price)):
            if kappa[i] * top - base[i] >= 0.0 and open_at[i] <= top:
                slope += price[i] * kappa[i]
                offset += price[i] * base[i]
        if slope <= 0.0:
            # Nothing that grows with z is open yet, so the next device to open determines the next level.
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
def level(start: float, chain: Chain, demand: Demand, price: FloatArray) -> float:
    """Return the least z at which `fill` finds room for every group, or infinity; ``start`` is a guess."""
    z = start
    for step in range(MOST_STEPS):
        paid, left = fill(z, chain, demand, price)
        root = level_paid_for(z, paid, chain, price)
        if root == np.inf:
            return root
        if left > 1e-14 * paid and root <= z * (1.0 + 1e-15):
            # Too low, but the prices prove no more, because a device opens with room at once: go to the next opening.
            following = np.inf
            for i in range(len(price)):
                if chain.open_at[i] > z:
                    following = min(following, chain.open_at[i])
            if following == np.inf:
                return z
            z = following
            continue
        if step > 0 and abs(root - z) <= 1e-14 * z:
            return root
        z = root
    return z
