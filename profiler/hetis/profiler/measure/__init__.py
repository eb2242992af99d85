"""Measuring operators on this host: what to measure next, how to time it, and what to make of a busy machine.

What needs torch (`device`, `kernels`, `peers`) is imported by `session` alone; the rest is pure and takes its clock
and its timers as arguments.
"""
