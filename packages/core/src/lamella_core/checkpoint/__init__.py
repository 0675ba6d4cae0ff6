"""Reading and writing weights: safetensors, Hugging Face directories, Lamella checkpoints."""
