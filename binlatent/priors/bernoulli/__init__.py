"""The Bernoulli diffusion of the paper (Section 4), its mathematics as plain functions."""
