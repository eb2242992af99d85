"""What a replica takes of memory at least, as the published heuristics estimate it before they search."""

from __future__ import annotations

from hetis.solver.model import ModelSpec


def weight_bytes(model: ModelSpec) -> float:
    """All weights of a model, once."""
    ends = model.embedding_params * (1 if model.tie_embeddings else 2)
    return (model.params() - ends) * model.weight_bytes + ends * model.embedding_bytes


def replica_bytes(model: ModelSpec, headroom: float) -> float:
    """Estimated memory of a replica: weights, and KV of ``headroom`` times as many bytes."""
    return (1.0 + headroom) * weight_bytes(model)
