"""Quantization: what is quantized (config), and how a linear layer stores and multiplies its weights."""
