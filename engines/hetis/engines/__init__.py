"""How engines run a plan: a replica as processes, the command line of each, and what versions of engines understand.

Pure functions: nothing is started, and no file is read.
"""
