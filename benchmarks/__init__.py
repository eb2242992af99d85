"""Benchmarks: each module is run as ``python -m benchmarks.NAME [--quick] [--json]`` and prints one row per case.

`benchmarks.measuring` holds what they share. `docs/benchmarks.md` says what each shows and keeps the last full run.
"""
