"""The API of ``import hetis``: the planner for programs and notebooks."""
