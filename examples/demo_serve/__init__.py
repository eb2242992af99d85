"""The demo of ``make demo-serve``."""
