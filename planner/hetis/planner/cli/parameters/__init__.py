"""Options of verbs: their groups, values and completions, and defaults from files."""
