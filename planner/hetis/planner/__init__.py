"""The application around the solver: the `hetis-plan` command line, its reports, and what a plan is made from."""
