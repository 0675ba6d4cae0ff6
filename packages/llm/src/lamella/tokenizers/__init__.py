"""Tokenizers of families that `transformers` has no class for, read from their vocabulary files; see `families`."""
