"""Runners: what computes the logits of a step."""
