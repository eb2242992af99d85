"""The `hetis-plan` command line: one module per verb, combined by `app`.

Nothing heavy is imported at the top of these modules, so that ``hetis-plan --help`` answers at once.
"""
