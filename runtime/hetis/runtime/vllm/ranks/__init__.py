"""What a rank of vLLM does with head groups: its head map, a step's tensors, its workers and the exchange with them."""
