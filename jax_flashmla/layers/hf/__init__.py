"""Hugging Face models: their configurations, and the tensors of their checkpoints."""
