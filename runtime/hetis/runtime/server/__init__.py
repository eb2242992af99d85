"""The front: OpenAI's HTTP interface over an engine that runs in a thread of its own, and its metrics."""
