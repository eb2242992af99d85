"""Common parts of the commands: where a verb writes, the options of every verb, and how a command line ends.

Only command lines import this package: it needs typer and rich, which come with their extras and not with the base
install, except in `process`. Each command defines its own exit codes and failure messages.
"""
