"""The model to serve: a list of layers, and the FLOPs and bytes that follow from their kinds."""

from hetis.solver.model.attention import Grouped, Latent, Recurrent
from hetis.solver.model.compressed import Compressed
from hetis.solver.model.layers import Layer
from hetis.solver.model.mixer import Indexer, Kernel, Mixer
from hetis.solver.model.mlp import Dense, Experts, Mlp
from hetis.solver.model.spec import ModelSpec
from hetis.solver.model.variants import DraftShape, GpuPrecision

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
