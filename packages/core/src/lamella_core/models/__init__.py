"""Models: one file per architecture, named after its Hugging Face ``model_type``."""
