"""The mathematics of hetis: problem and plan types, the cost model, placement, the checker.

These functions are pure: no gRPC, no torch, no files, no global state. Time is read through a `Budget`.
"""
