"""How the tables came to be, step by step; run by `hetis.planner.store.migrating`."""
