"""Running a plan on engines: the processes of a replica, their command lines, and the options of engine versions.

Pure functions: nothing is started, and no file is read.
"""
