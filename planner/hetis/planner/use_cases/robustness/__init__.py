"""The uncertainty of a plan's numbers: the effects of its profiles' errors, and of other coefficients."""
