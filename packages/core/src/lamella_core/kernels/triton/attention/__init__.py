"""Attention over a paged cache: `decode` for one query per sequence, `prefill` for prompt chunks."""
