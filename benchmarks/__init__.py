"""Benchmarks. Each module runs as ``python -m benchmarks.NAME [--quick] [--json]`` and prints one row per case.

`benchmarks.measuring` holds their common parts. `docs/benchmarks.md` explains each and keeps the last full run.
"""
