"""Plans as files for engines and orchestrators. What a target cannot carry is reported."""
