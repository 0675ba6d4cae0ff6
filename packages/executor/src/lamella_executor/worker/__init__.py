"""Ranks 1 and up: their processes, how rank 0 starts, feeds and watches them, and what they run."""
