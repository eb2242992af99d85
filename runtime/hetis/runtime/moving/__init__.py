"""Moving heads of running requests between devices while tokens flow."""
