"""Head-level serving inside vLLM: an attention backend, a KV cache manager and a KV connector on its extension points."""
