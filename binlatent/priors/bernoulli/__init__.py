"""The Bernoulli diffusion of the paper (Section 4)."""
