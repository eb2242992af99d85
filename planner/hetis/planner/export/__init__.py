"""Plans as the files of engines and orchestrators: what each carries is written, what it cannot is said."""
