"""Chains and meshes of one-node stages: the contiguous layers of every node, and the paths of requests through them.

Start with `hetis.solver.layers.problem` and `hetis.solver.layers.solve`; the model is described in `docs/layers.md`.
"""
