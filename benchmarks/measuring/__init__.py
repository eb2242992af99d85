"""What the benchmarks share: problems (`instances`), solves in processes of their own (`solving`), rows (`rows`)."""
