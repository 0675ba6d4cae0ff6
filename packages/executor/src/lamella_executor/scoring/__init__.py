"""Models that score a text instead of continuing it: no KV cache, no sampling, one forward pass per request."""
