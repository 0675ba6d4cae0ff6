"""The runner of a CUDA device: state that lives there, steps packed into one transfer, captured decoding steps."""
