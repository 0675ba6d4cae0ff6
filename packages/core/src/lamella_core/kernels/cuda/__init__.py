"""Kernels in CUDA C++ for Hopper GPUs, compiled where they run (see `lamella_core.kernels.cuda.driver`).

They need what torch installs and no compiler. Without them the libraries' products and Triton's kernels serve.
"""
