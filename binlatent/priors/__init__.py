"""Stage 2: priors over binary codes, a folder a kind (paper, Section 4)."""
