"""The `hetis-plan` command line: one module per verb, `app` ties them together.

Nothing heavy is imported at the top of these modules: ``hetis-plan --help`` must answer at once.
"""
