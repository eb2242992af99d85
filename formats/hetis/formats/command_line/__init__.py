"""What the commands have in common: where a verb writes, the options of every verb, and how a command line ends.

Only command lines import this room: it needs typer and rich, which come with their extras and not with the base
install. What a command calls its exit codes and how it words its failures is its own.
"""
