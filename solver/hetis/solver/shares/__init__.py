"""Fair shares of a mixed fleet among tenants: OEF (Middleware'24), its properties, and other published rules.

A tenant's *value* is its throughput over what one GPU of the slowest type gives it. `docs/fair.md` explains the rules.
"""
