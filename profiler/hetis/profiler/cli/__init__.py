"""The `hetis-profile` command line: one module per verb, `app` ties them together.

Nothing heavy is imported at the top of these modules: ``hetis-profile --help`` must answer at once. The profiler lies
below the planner and may not import it: what both command lines need of a terminal, each has.
"""
