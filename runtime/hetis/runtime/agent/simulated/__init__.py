"""A simulated hetis engine: no GPU, no model, but KV blocks, head maps, a decode loop and two-phase moves."""
