"""A bound on cost that holds for every plan under the cost model, whatever its strategy: from dense work alone.

Every request needs the dense work of all L repeated layers, its prompt's and its output's. A GPU that gives its time
to that work alone, at the best mix and TP size there is, no attention, KV or waiting, does at most a certain number
of layers per second: u of both at once, p of prompts, d of outputs. A plan that serves r requests/s has r L layers'
worth of prompts and r L of outputs done per second, and so for every share q from 0 to 1

    r L  =  q r L + (1 - q) r L  <=  sum over GPUs of max(u, q p, (1 - q) d)

because a GPU that spends a part of its time on each kind of work adds at most the largest of the three per second. (The
bound on the rate is `hetis.solver.placement.out_of_reach.rate_bound`, by the same argument.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.placement.tables import Atlas, FloatArray
from hetis.solver.plan import Role

SHARES = np.linspace(0.0, 1.0, 101)  # q


@dataclass(frozen=True, slots=True)
class LayerSpeeds:
    """Layers per second of one GPU of every class, shape [N]: u, p and d of the module's text."""

    unified: FloatArray
    prefill: FloatArray
    decode: FloatArray

    @staticmethod
    def of(atlas: Atlas) -> LayerSpeeds:
        """Derive the bound from the tables of a problem whose family has all roles: a role that is missing gets no
        speed."""
        layer_s = atlas.scopes[0].tables.layer_s
        speeds = np.zeros((3, len(atlas.classes)))
        for x, mix in enumerate(atlas.mixes):
            row = (Role.UNIFIED, Role.PREFILL, Role.DECODE).index(mix.role)
            for s, (g, tp) in enumerate(atlas.ranks):
                speeds[row, g] = max(speeds[row, g], 1.0 / (tp * layer_s[x, s]))
        return LayerSpeeds(*speeds)

    def at(self, share: float) -> FloatArray:
        """Return what a GPU of each class adds at most to r L, shape [N]."""
        result: FloatArray = np.maximum(self.unified, np.maximum(share * self.prefill, (1.0 - share) * self.decode))
        return result


def least_cost(atlas: Atlas, demand: float, unit_costs: FloatArray) -> float:
    """No plan that serves ``demand`` requests/s costs less; ``unit_costs`` of one GPU of every class, shape [N].

    The cheapest GPUs per layer and second first, the last class in part. Infinite where the fleet is too small.
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
