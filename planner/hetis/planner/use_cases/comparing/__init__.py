"""Plans side by side: of strategies, of engines, or two that are saved."""
