"""A compact language model of DeepSeek's architecture that serves published checkpoints."""
