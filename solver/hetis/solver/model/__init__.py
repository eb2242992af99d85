"""The model to serve: a list of layers, and the FLOPs and bytes that follow from their kinds."""

from hetis.solver.model.attention import Compressed, Grouped, Indexer, Kernel, Latent, Mixer, Recurrent
from hetis.solver.model.mlp import Dense, Experts, Mlp
from hetis.solver.model.spec import DraftShape, GpuPrecision, Layer, ModelSpec

__all__ = [
    "Compressed",
    "Dense",
    "DraftShape",
    "Experts",
    "GpuPrecision",
    "Grouped",
    "Indexer",
    "Kernel",
    "Latent",
    "Layer",
    "Mixer",
    "Mlp",
    "ModelSpec",
    "Recurrent",
]
