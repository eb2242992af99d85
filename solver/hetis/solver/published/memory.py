"""What a replica takes of memory at least, as the published heuristics estimate it before they search."""

from __future__ import annotations

from hetis.solver.model import ModelSpec
from hetis.solver.placement.tables import Atlas

HEADROOM_REQUESTS = 32  # whose KV a replica has room for


def weight_bytes(model: ModelSpec) -> float:
    """All weights of a model, once."""
    ends = model.embedding_params * (1 if model.tie_embeddings else 2)
    return (model.params() - ends) * model.weight_bytes + ends * model.embedding_bytes


def replica_bytes(atlas: Atlas) -> float:
    """Estimated memory of a replica: weights, and the KV of a few requests."""
    model = atlas.problem.model
    tokens = HEADROOM_REQUESTS * model.cached_tokens(atlas.moments.resident_context)
    return weight_bytes(model) + tokens * model.kv_bytes_per_token()
