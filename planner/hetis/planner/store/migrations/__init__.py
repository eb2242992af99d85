"""The history of the tables, step by step; run by `hetis.planner.store.migrating`."""
