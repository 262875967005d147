"""Stage 2: priors over binary codes, with a folder for each kind (paper, Section 4)."""
