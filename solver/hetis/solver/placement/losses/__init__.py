"""Plans by what is left after a loss: those that survive it, and the simplest of those that lose little."""
