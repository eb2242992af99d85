"""Head-level serving inside vLLM through its extension points: attention backend, KV cache manager, KV connector."""
