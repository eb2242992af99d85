"""A bound on cost that holds for every plan under the cost model, whatever its strategy, from dense work alone.

Every request needs the dense work of all L repeated layers for its prompt and for its output. A GPU that spends its
time on that work alone, at the best mix and TP size and without attention, KV or waiting, does at most a certain number
of layers per second: u of both at once, p of prompts, d of outputs. A plan that serves r requests/s does r L layers'
worth of prompts and r L of outputs per second, so for every share q from 0 to 1

    r L  =  q r L + (1 - q) r L  <=  sum over GPUs of max(u, q p, (1 - q) d)

because a GPU that divides its time between the kinds of work adds at most the largest of the three per second. (The
bound on the rate, `hetis.solver.placement.out_of_reach.rate_bound`, uses the same argument.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.placement.tables import Atlas, FloatArray
from hetis.solver.plan import Role

SHARES = np.linspace(0.0, 1.0, 101)  # q


@dataclass(frozen=True, slots=True)
class LayerSpeeds:
    """Layers per second of one GPU of every class, shape [N]: u, p and d of the module's docstring."""

    unified: FloatArray
    prefill: FloatArray
    decode: FloatArray

    @staticmethod
    def of(atlas: Atlas) -> LayerSpeeds:
        """Return the speeds from a problem's tables, whose family has all roles: a missing role gets speed 0."""
        layer_s = atlas.scopes[0].tables.layer_s
        speeds = np.zeros((3, len(atlas.classes)))
        for x, mix in enumerate(atlas.mixes):
            row = (Role.UNIFIED, Role.PREFILL, Role.DECODE).index(mix.role)
            for s, (g, tp) in enumerate(atlas.ranks):
                speeds[row, g] = max(speeds[row, g], 1.0 / (tp * layer_s[x, s]))
        return LayerSpeeds(*speeds)

    def at(self, share: float) -> FloatArray:
        """Return the most that a GPU of each class adds to r L, shape [N]."""
        result: FloatArray = np.maximum(self.unified, np.maximum(share * self.prefill, (1.0 - share) * self.decode))
        return result


def least_cost(atlas: Atlas, demand: float, unit_costs: FloatArray) -> float:
    """Return a lower bound on the cost of serving ``demand`` requests/s; ``unit_costs`` [N] are per GPU and class.

    The cheapest GPUs per layer and second come first, the last class in part. The bound is infinite if the fleet is too
    small.
    """
    speeds, available = LayerSpeeds.of(atlas), _available(atlas)
    return max(_filled(speeds.at(q), available, unit_costs, demand * _layers(atlas)) for q in SHARES)


def _filled(speed: FloatArray, available: FloatArray, unit_costs: FloatArray, needed: float) -> float:
    total, per_layer = 0.0, unit_costs / np.maximum(speed, 1e-300)
    for g in np.argsort(per_layer, kind="stable"):
        taken = min(needed, float(speed[g] * available[g]))
        total += taken * float(per_layer[g])
        needed -= taken
        if needed <= 1e-12:
            return total
    return float("inf")


def _available(atlas: Atlas) -> FloatArray:
    return np.array([c.available for c in atlas.classes], dtype=float)


def _layers(atlas: Atlas) -> int:
    return atlas.scopes[0].tables.num_layers
