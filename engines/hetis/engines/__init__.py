"""How plans run on engines: the processes of a replica, their command lines, and the options of each engine version.

These are pure functions: they start nothing and read no files.
"""
