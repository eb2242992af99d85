"""`ExecutorService`, what an agent asks of an engine: all that does not depend on which engine it is."""
