"""A simulated engine: no GPU and no model, but KV blocks, head maps, a decode loop and two-phase moves."""
