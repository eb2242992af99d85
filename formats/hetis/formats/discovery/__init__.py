"""Discovery of a fleet from the output of other tools: it becomes a cluster, with reasons for everything left out.

``reading`` recognises which tool wrote a file, one module per tool turns its output into `FoundNode` values, ``boards``
finds the GPU type that a product name means, and ``fleet`` builds the cluster.
"""
