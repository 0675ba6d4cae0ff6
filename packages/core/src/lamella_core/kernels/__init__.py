"""Kernels: the code that does the arithmetic, and the registry from which a matmul kernel is chosen by timing.

Importing this package loads nothing heavy and compiles nothing; native code is compiled when first used.
"""
