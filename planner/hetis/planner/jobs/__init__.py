"""Searches for plans in processes of their own: what is asked, how it ends, who works on it."""
