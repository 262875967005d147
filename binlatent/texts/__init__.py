"""Captions to features: text encoders in Flax, their tokenisers and their files."""
