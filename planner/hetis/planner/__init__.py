"""The application around the solver: the `hetis-plan` command line, its reports, and the inputs of plans."""
