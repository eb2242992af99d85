"""The status page: what it shows, and its HTTP server."""
