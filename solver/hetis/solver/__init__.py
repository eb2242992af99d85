"""The mathematics of hetis: problem and plan types, the cost model, placement, the checker.

Pure functions: no gRPC, no torch, no files, no global state; time comes in through a `Budget`.
"""
