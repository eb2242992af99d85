"""What all commands share: where a verb writes, the options of every verb, how a command line ends, and addresses.

Only command lines import this package, but for `endpoints`, `exit_codes` and `groups`. Its other modules need typer and
rich, which come with the extras and not with the base install, except for `process`. Each command defines its own exit
codes and failure messages.
"""
