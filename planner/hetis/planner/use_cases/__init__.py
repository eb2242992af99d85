"""What users ask for, files in and a result out: place, compare, what-if, replan, share, simulate, robustness."""
