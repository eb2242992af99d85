"""Models from Hugging Face folders: what they are, their weights, and their layers without attention."""
