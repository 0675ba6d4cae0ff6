"""``lamella bench``: throughput and latency of fixed-length random token prompts, and where the time of a step goes."""
