"""What the planning service keeps: records in SQLite or PostgreSQL, one durable transaction at a time."""
