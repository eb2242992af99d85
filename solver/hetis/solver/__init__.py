"""The mathematics of hetis: problem and plan types, the cost model, placement, the checker.

The functions are pure: no gRPC, no torch, no files, no global state. Time comes in through a `Budget`.
"""
