"""The agents of nodes: their streams, what they may send, their presence, and what each node holds."""
