"""`ExecutorService`, the engine's interface to its agent: everything that does not depend on the kind of engine."""
