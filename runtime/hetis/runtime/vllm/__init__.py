"""Head-level serving inside vLLM, on its own extension points: attention backend, KV cache manager, KV connector."""
