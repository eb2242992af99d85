"""Rich tables of plans and explanations that fit 80 columns. Neither command logic nor files."""
