"""Text encoders in Flax, their tokenizers, and features of captions on disk."""
