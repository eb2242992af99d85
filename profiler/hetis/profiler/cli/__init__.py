"""The `hetis-profile` command line: one module per verb, `app` ties them together.

Nothing heavy is imported at the top of these modules: ``hetis-profile --help`` must answer at once. What it shares with
`hetis-plan` is in `hetis.formats.command_line`.
"""
