"""How wrong a plan's numbers may be: what its profiles' errors make of them, and what other coefficients would."""
