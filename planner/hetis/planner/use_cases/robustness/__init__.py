"""The uncertainty of a plan's numbers: the effects of errors in its profiles, and of other coefficients."""
