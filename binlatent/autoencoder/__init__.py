"""Stage 1: the binary autoencoder (paper, Section 3)."""
