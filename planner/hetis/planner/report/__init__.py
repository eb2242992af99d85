"""Plans and explanations as rich tables that fit 80 columns. No verb logic, no files."""
