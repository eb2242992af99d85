"""Chains and meshes of one-node stages: which contiguous layers every node holds, and how requests go through them.

Start at `hetis.solver.layers.problem` and `hetis.solver.layers.solve`; the model is `docs/layers.md`.
"""
