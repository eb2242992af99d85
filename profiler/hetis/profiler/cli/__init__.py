"""The `hetis-profile` command line: one module per verb, combined in `app`.

Nothing heavy is imported at the top of these modules: ``hetis-profile --help`` must answer at once. Parts shared with
`hetis-plan` are in `hetis.commands`.
"""
