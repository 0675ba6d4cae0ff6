"""How ranks exchange tensors: gloo on CPUs, NCCL and kernels of our own on GPUs, with no default process group."""
