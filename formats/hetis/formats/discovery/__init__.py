"""A fleet as other tools describe it: what they print becomes a cluster, and what is left out is told with its reason.

``reading`` knows which tool wrote a file, one module per tool makes `FoundNode` of what it wrote, ``boards`` finds the
GPU type that a product name means, and ``fleet`` puts the cluster together.
"""
