"""Models: their files, and all other ways to specify one: Hugging Face folders."""
