"""Measures operators on this host: what to measure next, how to time it, and how to recognise a busy machine.

Modules that need torch (`device`, `kernels`, `peers`) are imported only by `session`. The rest is pure and takes its
clock and its timers as arguments.
"""
