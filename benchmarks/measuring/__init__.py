"""Common parts of the benchmarks: problems (`instances`), solves in separate processes (`solving`), rows (`rows`)."""
