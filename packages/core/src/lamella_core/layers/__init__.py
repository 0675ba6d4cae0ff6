"""Layers: parallel, quantizable building blocks of models."""
