"""Rich tables of plans and explanations that fit in 80 columns. Contains no command logic and reads no files."""
